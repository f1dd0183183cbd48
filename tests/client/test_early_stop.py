"""Early stop: the best state by the loss on rows kept aside, and no step after it is known."""

from dataclasses import replace

import numpy as np
import pytest
from plain_loop import lesson

from client.config import configure
from client.learning import learn
from client.stopping import EarlyStop, rows_aside
from client.training import FineTuning, build_task
from dare_agg.errors import ConfigError

torch = pytest.importorskip("torch")


def watched(losses, *, patience, every, steps):
    """Train one weight by 0.1 a step while the loss aside is as given; (weight, steps, stop)."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    left = iter(losses)
    stop = EarlyStop({"w": weight}, lambda: next(left), patience, every)
    config = configure(learning_rate=0.1)
    made = lesson({"w": weight}, lambda read: -weight.sum(), config, stop=stop)
    taken = learn(made, [np.arange(1)] * steps)
    return round(float(weight.detach()), 4), len(taken), stop


@pytest.mark.parametrize(
    ("losses", "patience", "every", "steps", "weight", "taken"),
    [
        ([5, 4, 3, 3.5, 3.2, 1], 2, 1, 9, 0.2, 4),  # the lower one after the end is never seen
        ([5, 4, 3, 3.5, 2], 2, 1, 4, 0.4, 4),  # one worse look is borne
        ([5, 6, 7, 8], 3, 1, 9, 0.0, 3),  # the received state is the best
        ([5, 4, 3], 1, 3, 6, 0.6, 6),  # a look every third step
        ([5, 4, 4.5], 5, 3, 5, 0.3, 5),  # the last state is looked at too
        ([5, float("nan"), float("nan")], 2, 1, 9, 0.0, 2),
        ([float("nan"), float("nan"), 7, 8], 2, 1, 3, 0.2, 3),
        ([5, 5, 5], 2, 1, 9, 0.0, 2),  # no better is no better
    ],
)
def test_the_best_state_is_kept(losses, patience, every, steps, weight, taken):
    found = watched(losses, patience=patience, every=every, steps=steps)
    assert found[:2] == (weight, taken)
    assert found[2].best_step == round(10 * weight)


@pytest.fixture
def task(tiny_model, review_files):
    return build_task(
        configure(
            model=str(tiny_model), data=str(review_files["csv"]), text_column="review",
            label_column="tone", length=12, steps=30, learning_rate=3e-3, head_learning_rate=0.1,
            early_stop=2, early_stop_every=3, early_stop_rows=20,
        )
    )  # fmt: skip


def test_a_client_sends_the_state_of_least_loss_on_rows_it_never_trained_on(task):
    start, rows = task.initial_state(), np.arange(100, 180)
    seen = []
    read = task._read
    task._read = lambda split, at: seen.append((task._load().training, at)) or read(split, at)
    trains = []
    scores = task.kind.scores
    task.kind = replace(
        task.kind, scores=lambda n, b: trains.append(torch.is_grad_enabled()) or scores(n, b)
    )
    trained, examples, measured = task.train(start, rows, seed=[1])
    assert examples == 60
    trained_on = {int(i) for (_, at), on in zip(seen, trains, strict=True) if on for i in at}
    aside = {int(i) for (_, at), on in zip(seen, trains, strict=True) if not on for i in at}
    assert len(aside) == 20 and not aside & trained_on and aside | trained_on <= set(rows.tolist())
    again = task.evaluate(trained, np.array(sorted(aside)), split="train")
    assert again["loss"] == pytest.approx(measured["early-stop-loss"], rel=1e-5)
    before = task.evaluate(start, np.array(sorted(aside)), split="train")
    assert measured["early-stop-loss"] < before["loss"]
    other, _, _ = task.train(start, rows, seed=[1])
    assert all(np.array_equal(trained[name], other[name]) for name in start)


def test_the_round_goes_on_as_without_looks_until_it_stops(task):
    start, rows = task.initial_state(), np.arange(80)
    config = replace(task.config, early_stop=99, steps=6)
    watched = FineTuning(config, task.data, task.kind)
    left, _ = rows_aside(rows, config, watched.readable)
    trained, _, measured = watched.train(start, rows, seed=[1])
    plain = FineTuning(replace(config, early_stop=0), task.data, task.kind)
    expected, _, _ = plain.train(start, left, seed=[1])
    assert measured["early-stop-step"] == 6
    assert all(np.array_equal(trained[name], expected[name]) for name in start)


def test_dropout_is_off_in_looks_and_on_again_after(task):
    config = replace(task.config, dropout=0.3, steps=6)
    watched = FineTuning(config, task.data, task.kind)
    modes = []
    scores = task.kind.scores

    def note(network, batch):
        modes.append((torch.is_grad_enabled(), any(m.training for m in network.modules())))
        return scores(network, batch)

    watched.kind = replace(task.kind, scores=note)
    watched.train(task.initial_state(), np.arange(80), seed=[1])
    assert set(modes) == {(True, True), (False, False)} and modes[-2][0]


def test_words():
    with pytest.raises(ConfigError, match="early-stop needs early-stop-rows"):
        configure(early_stop=1, early_stop_rows=0)
    with pytest.raises(ConfigError, match=r"early-stop-rows = 1\.5; a share"):
        configure(early_stop_rows=1.5)
    with pytest.raises(ConfigError, match="early-stop-every = 0; 1 to"):
        configure(early_stop_every=0)


def test_too_few_rows_to_keep_any_aside(task):
    with pytest.raises(ConfigError, match="early-stop-rows = 20 takes all 20 rows of a client"):
        task.train(task.initial_state(), np.arange(20), seed=[1])
