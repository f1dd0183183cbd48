"""Learning rates step by step against torch's and transformers' own; clipping; decay by group."""

import numpy as np
import pytest
from plain_loop import lesson

from client.config import configure
from client.learning import learn
from client.optimizer import make_optimizer
from client.schedule import SCHEDULES, Progress, rate_factor
from client.training import build_task
from client.words import CHOICES
from dare_agg.errors import ConfigError

torch = pytest.importorskip("torch")
STEPS = 20


def rates(scheduler_of, steps=STEPS, rate=1.0):
    """The learning rate of each step under one of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=rate)
    scheduler = scheduler_of(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def ours(steps=STEPS, progress=None, **words):
    factor = rate_factor(configure(**words), steps, progress or Progress())
    return [factor(step) for step in range(steps)]


def test_every_schedule_is_torchs_own():
    lr = torch.optim.lr_scheduler
    cosine = rates(lambda o: lr.CosineAnnealingLR(o, T_max=STEPS))
    linear = rates(lambda o: lr.LinearLR(o, 1.0, 0.0, total_iters=STEPS))
    assert ours(schedule="cosine") == pytest.approx(cosine, abs=1e-12)
    assert ours(schedule="linear") == pytest.approx(linear, abs=1e-12)
    assert ours() == [1.0] * STEPS


@pytest.mark.parametrize("warm_up", [5, 0.25])
def test_warm_up_is_torchs_own(warm_up):
    lr = torch.optim.lr_scheduler

    def both(optimizer):
        rise = lr.LinearLR(optimizer, 1 / 5, 1.0, total_iters=4)
        fall = lr.CosineAnnealingLR(optimizer, T_max=STEPS - 5)
        return lr.SequentialLR(optimizer, [rise, fall], milestones=[5])

    assert ours(schedule="cosine", warm_up=warm_up) == pytest.approx(rates(both), abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_after_the_warm_up_the_rates_are_those_of_transformers(name):
    from transformers import get_scheduler

    theirs = rates(lambda o: get_scheduler(name, o, num_warmup_steps=5, num_training_steps=STEPS))
    assert ours(schedule=name, warm_up=5)[5:] == pytest.approx(theirs[5:], abs=1e-12)


def test_over_a_run_the_rounds_are_pieces_of_one_curve():
    words = {"schedule": "cosine", "warm_up": 0.2}
    whole = ours(steps=40, **words)
    pieces = [
        rate
        for number in range(1, 5)
        for rate in ours(10, Progress(number, 4), schedule_over="run", **words)
    ]
    assert pieces == whole
    assert ours(10, Progress(3, 4), **words) == ours(10, Progress(1, 4), **words)
    assert ours(10, Progress(9, 4), schedule_over="run", **words) == [0.0] * 10


def test_the_tables_name_the_same_schedules():
    assert tuple(SCHEDULES) == CHOICES["schedule"]


def test_the_optimizer_takes_the_rates_of_the_schedule():
    """A loss with gradient 1 moves a weight by the rate of each step (Adam's first steps)."""
    weight = torch.nn.Parameter(torch.zeros(1))
    config = configure(learning_rate=0.1, schedule="linear", warm_up=2)
    seen = []

    def loss(at):
        seen.append(float(weight.detach()))
        return weight.sum()

    learn(lesson({"w": weight}, loss, config), [np.arange(1)] * 6)
    moved = -np.diff([*seen, float(weight.detach())])
    assert moved == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025], rel=1e-4)


def test_the_gradient_is_clipped_to_its_norm():
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    weights = {n: torch.nn.Parameter(torch.zeros(2)) for n in "ab"}
    norms = []

    def loss(at):
        return sum((i + 3) * 100 * w.sum() for i, w in enumerate(weights.values()))

    def watch(optimizer, *_):
        norms.append(float(torch.cat([w.grad for w in weights.values()]).norm()))

    hook = register_optimizer_step_pre_hook(watch)
    try:
        for clip in (0.0, 0.5):
            learn(lesson(weights, loss, configure(clip_norm=clip)), [np.arange(1)])
    finally:
        hook.remove()
    assert norms == [pytest.approx(500 * 2**0.5), pytest.approx(0.5, rel=1e-4)]


def test_biases_norms_and_embeddings_do_not_decay_on_request(tiny_language_model, tiny_model):
    from transformers import AutoModel, AutoModelForCausalLM

    bert = AutoModel.from_pretrained(tiny_model)
    llama = AutoModelForCausalLM.from_pretrained(tiny_language_model)  # its head is tied
    for network in (bert, llama):
        named = dict(network.named_parameters())
        config = configure(weight_decay=0.1, weight_decay_on="matrices")
        names = {id(p): n for n, p in named.items()}
        found = {
            names[id(p)]: group["weight_decay"]
            for group in make_optimizer(config, named, network).param_groups
            for p in group["params"]
        }
        assert set(found) == set(named)
        for name, decay in found.items():
            spared = "bias" in name or "norm" in name.lower() or "embed" in name
            assert decay == (0.0 if spared else 0.1), name
        everywhere = make_optimizer(configure(weight_decay=0.1), named, network).param_groups
        assert {group["weight_decay"] for group in everywhere} == {0.1}


def test_a_client_trains_by_the_rounds_rate(tiny_model, review_files):
    words = {"text_column": "review", "label_column": "tone", "length": 12, "steps": 2}
    settled = configure(
        model=str(tiny_model), data=str(review_files["csv"]), schedule="linear",
        schedule_over="run", learning_rate=1e-3, **words,
    )  # fmt: skip
    task = build_task(settled)
    start, rows = task.initial_state(), np.arange(40)

    def moved(progress):
        state, _, _ = task.train(start, rows, seed=[0], progress=progress)
        return max(float(np.abs(state[name] - start[name]).max()) for name in start)

    assert moved(Progress(1, 100)) > 10 * moved(Progress(99, 100)) > 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"schedule_over": "runs"}, "did you mean 'run'"),
        ({"weight_decay_on": "matrix"}, "did you mean 'matrices'"),
        ({"warm_up": -0.1}, "warm-up = -0.1; 0 to"),
        ({"clip_norm": float("nan")}, "clip-norm = nan; 0 to"),
        ({"learning_rate": float("inf")}, "learning-rate = inf; 0 to"),
        ({"weight_decay": "much"}, "weight-decay = 'much'; a number is needed"),
    ],
)
def test_words_out_of_bounds(words, why):
    from server.reading import read_config

    with pytest.raises(ConfigError, match=why.replace(".", r"\.")):
        configure(**words)
    with pytest.raises(ConfigError):
        read_config({key.replace("_", "-"): value for key, value in words.items()})
