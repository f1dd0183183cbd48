"""DP-SGD at a client: clipped row by row, whatever the network; noise; nothing told of rows."""

import numpy as np
import pytest

from client.config import configure
from client.learning import Lesson
from client.privately import PrivateSteps, check_private, clipped_sum
from client.training import build_task
from dare_agg.errors import ConfigError

KEY = b"s" * 16


def steps(**words):
    return PrivateSteps(
        **{"steps": 3, "batch": 8, "rate": 0.1, "clip": 1.0, "noise": 1.0, "key": KEY, **words}
    )


@pytest.fixture
def make(tiny_model, review_files):
    def made(**more):
        settings = {
            "model": str(tiny_model),
            "data": str(review_files["csv"]),
            "text_column": "review",
            "label_column": "tone",
            "length": 12,
            "learning_rate": 1e-3,
        }
        return build_task(configure(**{**settings, **more}))

    return made


@pytest.fixture
def lesson():
    def made(task):
        named = task._place(task.initial_state())
        network = task._load()
        network.eval()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in named)
        return Lesson(
            task.config,
            task.compute,
            network,
            named,
            read=lambda at: task._read("train", at),
            loss=task._loss,
        )

    return made


def flat(sums):
    return np.concatenate([part.numpy().ravel() for part in sums.values()])


@pytest.mark.parametrize("train", ["full", "lora", "head"])
def test_one_row_moves_the_sum_by_the_norm_at_most(make, lesson, train):
    learnt = lesson(make(train=train, lora_rank=2))
    norm = 0.01
    for row in (0, 5):
        alone = flat(clipped_sum(learnt, np.array([row]), norm))
        assert np.linalg.norm(alone) == pytest.approx(norm, rel=1e-9)
        assert np.linalg.norm(alone) <= norm * (1 + 1e-12)
        without = flat(clipped_sum(learnt, np.array([1, 2, 3]), norm))
        with_it = flat(clipped_sum(learnt, np.array([1, 2, row, 3]), norm))
        assert np.linalg.norm(with_it - without) <= norm * (1 + 1e-9)


def test_a_norm_above_all_gradients_leaves_them_as_they_are(make, lesson):
    learnt = lesson(make())
    rows = np.arange(6)
    ours = flat(clipped_sum(learnt, rows, 1e9))
    learnt.loss(learnt.read(rows)).backward()
    whole = np.concatenate(
        [
            (p.grad if p.grad is not None else p.detach() * 0).numpy().ravel()
            for p in learnt.named.values()
        ]
    )
    assert np.allclose(ours, 6 * whole, atol=1e-6)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_gradients_of_rows_are_those_of_opacus_where_it_has_them(make, lesson, train):
    opacus = pytest.importorskip("opacus")
    import torch

    learnt = lesson(make(train=train, lora_rank=2))
    rows, norm = np.arange(5), 1e9
    ours = [clipped_sum(learnt, np.array([row]), norm) for row in rows]
    learnt.network.train()
    for module in learnt.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    hooked = opacus.GradSampleModule(learnt.network, strict=False)
    read = learnt.read(rows)
    scores = hooked(**read.batch)
    torch.nn.functional.cross_entropy(scores, read.targets).backward()
    seen, wrong = 0, set()
    for name, parameter in learnt.named.items():
        theirs = getattr(parameter, "grad_sample", None)
        if theirs is None:
            continue
        if theirs.shape[0] != len(rows):  # no first axis of rows: theirs cannot be clipped by row
            wrong.add(name)
            continue
        seen += 1
        for row in rows:
            assert np.allclose(ours[row][name].numpy(), theirs[row].numpy(), atol=1e-5), name
    assert seen > 3
    assert all("position_embeddings" in name for name in wrong)


def test_private_training_is_repeated_by_its_key_and_by_no_other(make):
    task = make()
    start, rows = task.initial_state(), np.arange(80)
    first, examples, told = task.train(start, rows, seed=[0], privately=steps())
    again, *_ = task.train(start, rows, seed=[0], privately=steps())
    other, *_ = task.train(start, rows, seed=[0], privately=steps(key=b"t" * 16))
    assert examples == 80 and told == {}
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["head.weight"], other["head.weight"])


def test_the_public_seed_and_the_data_do_not_give_the_noise_away(make):
    task = make()
    start, rows = task.initial_state(), np.arange(80)
    seeds = [task.train(start, rows, seed=[seed], privately=steps())[0] for seed in (0, 1)]
    assert all(np.array_equal(seeds[0][name], seeds[1][name]) for name in start)


def test_a_step_without_rows_is_noise_alone(make):
    task = make()
    start = task.initial_state()
    moved, *_ = task.train(start, np.arange(80), seed=[0], privately=steps(rate=1e-12))
    assert all(not np.array_equal(moved[name], start[name]) for name in start)


def test_private_training_learns_where_the_noise_is_small(make):
    task = make(head_learning_rate=1e-2)
    rows = np.arange(len(task.train_rows))
    how = steps(steps=30, batch=32, rate=32 / len(rows), noise=0.05)
    moved, *_ = task.train(task.initial_state(), rows, seed=[0], privately=how)
    before = task.evaluate(task.initial_state())["accuracy"]
    assert task.evaluate(moved)["accuracy"] > before + 0.2


def test_dropout_draws_from_the_secret(make):
    task = make(dropout=0.2)
    start, rows = task.initial_state(), np.arange(60)
    how = [steps(rate=1.0, noise=0.05, key=key) for key in (KEY, b"u" * 16)]
    one, other = (task.train(start, rows, seed=[0], privately=h)[0] for h in how)
    again = task.train(start, rows, seed=[7], privately=how[0])[0]
    assert np.array_equal(one["head.weight"], again["head.weight"])
    assert not np.array_equal(one["head.weight"], other["head.weight"])


def test_batch_normalisation_over_rows_is_refused_and_fixed_statistics_are_not():
    import torch

    config = configure()
    mixing = torch.nn.Sequential(torch.nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(ConfigError, match="track_running_stats"):
        check_private(mixing, config)
    kept = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.GroupNorm(2, 4))
    with pytest.raises(ConfigError, match="mixes them"):
        check_private(kept.train(), config)
    check_private(kept.eval(), config)


def test_a_row_whose_gradient_is_no_number_adds_nothing(make, lesson):
    import torch

    learnt = lesson(make())
    rows = np.arange(3)
    good = flat(clipped_sum(learnt, rows, 1.0))

    def loss(read):
        found = learnt.loss(read)
        return found * torch.tensor(float("nan")) if loss.calls.pop(0) == 3 else found

    loss.calls = [0, 1, 2, 3]
    wild = Lesson(learnt.config, learnt.compute, learnt.network, learnt.named, learnt.read, loss)
    assert np.array_equal(flat(clipped_sum(wild, np.array([0, 1, 2, 9]), 1.0)), good)
