"""Pieces of a batch, activations made again, and dropout: what a step computes stays the same."""

from dataclasses import replace

import numpy as np
import pytest
from plain_loop import lesson

from client.batches import draw_batches
from client.config import configure, task_config
from client.learning import learn
from client.modes import prepare
from client.tasks.cross_entropy import IGNORED
from client.training import FineTuning, build_task
from dare_agg.errors import ConfigError

torch = pytest.importorskip("torch")


@pytest.fixture(params=["bert", "llama"])
def words(request, tiny_model, tiny_language_model, review_files):
    task, model = {
        "bert": ("text-classification", tiny_model),
        "llama": ("causal-lm", tiny_language_model),
    }[request.param]
    return {
        "task": task,
        "model": str(model),
        "data": str(review_files["csv"]),
        "text_column": "review",
        "label_column": "tone",
        "length": 12,
        "learning_rate": 1e-3,
        "steps": 4,
    }


def gradients(task: FineTuning, config, rows):
    """The gradients of the first step, by name."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    found = {}

    def watch(optimizer, *_):
        network = task._load()
        found.update(
            {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        )

    task = FineTuning(config, task.data, task.kind)
    hook = register_optimizer_step_pre_hook(watch)
    try:
        _, _, measured = task.train(task.initial_state(), rows, seed=[4])
    finally:
        hook.remove()
    return found, measured["train-loss"]


def test_two_pieces_of_eight_are_one_batch_of_sixteen(words):
    task = build_task(configure(**words, batch=16))
    once = replace(task.config, steps=1)
    rows = np.arange(24)
    whole, loss = gradients(task, once, rows)
    for pieces in (2, 3, 16):
        parts, again = gradients(task, replace(once, accumulate=pieces), rows)
        assert again == pytest.approx(loss, rel=1e-5)
        assert whole.keys() == parts.keys()
        for name, gradient in whole.items():
            assert torch.allclose(parts[name], gradient, rtol=1e-4, atol=1e-6), name


def test_pieces_of_unequal_length_weigh_by_their_targets(tiny_language_model, review_files):
    """The last block of a speaker is short: a mean over pieces would count its tokens for more."""
    task = build_task(
        configure(
            task="causal-lm", model=str(tiny_language_model), data=str(review_files["csv"]),
            text_column="review", label_column="tone", partition_by="author", length=30, steps=1,
        )
    )  # fmt: skip
    sizes = np.array([block.size for block in task.train_rows.inputs])
    rows = np.array([int(sizes.argmin()), int(sizes.argmax())])
    assert sizes[rows[0]] < sizes[rows[1]]
    config = replace(task.config, batch=2)
    whole, loss = gradients(task, config, rows)
    parts, again = gradients(task, replace(config, accumulate=2), rows)
    assert again == pytest.approx(loss, rel=1e-5)
    assert all(torch.allclose(parts[n], g, rtol=1e-4, atol=1e-6) for n, g in whole.items())


def test_a_piece_needs_less_memory_than_the_batch(words):
    task = build_task(configure(**words, batch=16, accumulate=4))
    sizes = []
    scores = task.kind.scores
    kind = replace(task.kind, scores=lambda n, b: sizes.append(len(b["input_ids"])) or scores(n, b))
    state = FineTuning(task.config, task.data, kind).train(task.initial, np.arange(24), seed=[1])[0]
    assert set(sizes) == {4} and len(sizes) == 16
    assert state.keys() == task.initial.keys()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activations_made_again_give_the_same_gradients(words, dropout):
    task = build_task(configure(**words))
    config = replace(task.config, steps=1, dropout=dropout)
    rows = np.arange(24)
    kept, loss = gradients(task, config, rows)
    again, other = gradients(task, replace(config, checkpointing=True), rows)
    assert other == loss
    assert kept.keys() == again.keys()
    assert all(torch.equal(again[name], gradient) for name, gradient in kept.items())


def test_checkpointing_really_keeps_less(words):
    """Tensors that the graph keeps, in bytes, with and without."""
    found = {}
    for checkpointing in (False, True):
        task = build_task(configure(**words, checkpointing=checkpointing))
        network = task._load()
        prepare(network, task.config)
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            task._loss(task._read("train", np.arange(16)))
        found[checkpointing] = size
    assert found[True] < 0.8 * found[False]


def test_dropout_draws_from_the_seed_and_leaves_other_generators_alone(words):
    task = build_task(configure(**words, dropout=0.2))
    start, rows = task.initial_state(), np.arange(24)
    torch.manual_seed(1)
    due = torch.rand(3)
    torch.manual_seed(1)
    first, _, measured = task.train(start, rows, seed=[0])
    assert torch.equal(torch.rand(3), due)
    again, _, _ = task.train(start, rows, seed=[0])
    without, _, _ = FineTuning(
        replace(task.config, dropout=0.0), task.data, task.kind
    ).train(start, rows, seed=[0])  # fmt: skip
    name = max(start, key=lambda n: start[n].size)
    assert all(np.array_equal(first[n], again[n]) for n in start)
    assert not np.array_equal(first[name], without[name])
    before = task.evaluate(first)
    assert before == task.evaluate(first)  # nothing is dropped there
    # The same rows, another seed of the drops alone.
    batches = draw_batches(rows, task.config, [0])
    assert len(batches) == task.config.steps and measured["train-loss"] > 0


def test_dropout_reaches_adapters_and_is_refused_where_there_is_none(words):
    task = build_task(configure(**words, dropout=0.5, train="lora", lora_rank=2))
    network = task._load()
    prepare(network, task.config)
    drops = [m for n, m in network.named_modules() if "lora_dropout" in n and hasattr(m, "p")]
    assert drops and all(m.p == 0.5 and m.training for m in drops)
    assert not any(m.training for m in network.modules() if isinstance(m, torch.nn.LayerNorm))

    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with pytest.raises(ConfigError, match=r"dropout = 0\.1: model '.*' has no dropout"):
        prepare(plain, configure(dropout=0.1))
    with pytest.raises(ConfigError, match="cannot make activations again"):
        prepare(plain, configure(checkpointing=True))
    prepare(torch.nn.Sequential(plain, torch.nn.Dropout(0.9)), configure(dropout=0.1))
    assert not plain[1].training


def test_what_no_target_counts_in_changes_nothing(tiny_language_model, review_files):
    task = build_task(
        configure(
            task="causal-lm", model=str(tiny_language_model), data=str(review_files["csv"]),
            text_column="review", label_column="tone", length=12, steps=3, batch=4,
        )
    )  # fmt: skip
    masked = replace(
        task.kind, targets=lambda b, y: torch.full_like(b["input_ids"][:, 1:], IGNORED)
    )
    with pytest.raises(ConfigError, match="no target counts in any of the 12 rows"):
        FineTuning(task.config, task.data, masked).train(task.initial, np.arange(20), seed=[0])


def test_batches_without_targets_are_passed_over():
    weight = torch.nn.Parameter(torch.zeros(1))
    made = lesson({"w": weight}, lambda read: weight.sum() * read.counted, configure(steps=2))
    made = replace(made, read=lambda at: made_reading(at))

    def made_reading(at):
        from client.learning import Reading

        return Reading({}, None, int(at[0]))

    assert learn(made, [np.array([0]), np.array([2]), np.array([0])]) == [0.0]
    assert float(weight.detach()) != 0


def test_words_and_the_nodes_own():
    for words, why in [
        ({"accumulate": 0}, "accumulate = 0; 1 to"),
        ({"dropout": 1.0}, r"dropout = 1\.0; 0 to 0\.9"),
        ({"checkpointing": "yes"}, "checkpointing = 'yes'; true or false"),
    ]:
        with pytest.raises(ConfigError, match=why):
            configure(**words)
    settled = task_config({"accumulate": 1}, {"accumulate": 4, "checkpointing": True})
    assert settled.accumulate == 4 and settled.checkpointing
