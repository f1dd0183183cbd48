"""``drop_rate="auto"`` in whole runs: what is sent, round by round, and who cannot change it."""

import logging
import re

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian

from dare_agg.checkpoint import write_checkpoint
from dare_agg.codec.budget import UploadBudget
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError
from dare_agg.flower import DareStrategy, dare, update_answer
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.rounds import auto
from dare_agg.rounds.messages import Receipt
from dare_agg.rounds.noise import LOUD, QUIET
from dare_agg.rounds.state import StateFolder

ROUNDS = 4


@pytest.fixture
def large(monkeypatch):
    """Toy models count as large ones."""
    monkeypatch.setattr(auto, "SMALL", 10)


def moving(toys, by):
    """An app whose clients move each weight by ``by`` times a normal draw."""

    def edit(partition, tuned, metrics):
        for name, array in tuned.items():
            if array.dtype.kind == "f" and "running" not in name:
                tuned[name] = array + np.float32(by) * toys.arrays(partition + 9)[name]

    return toys.app(edit=edit)


def sent(outcomes):
    """Drop rate and formats of each round's clients."""
    found = []
    for outcome in outcomes:
        measured = outcome.measurements
        found.append(
            (round(measured["drop_rates"][0], 6), "/".join(sorted(set(measured["values"]))))
        )
    return found


def run(grid, toys, strategy=None, rounds=ROUNDS, **words):
    """A run; returns what its rounds sent, and their outcomes."""
    outcomes = []

    def hook(outcome):
        outcomes.append(outcome)

    given = {"seed": 1, "round_hook": hook, **words}
    if strategy is None:
        strategy = DareStrategy(fraction_evaluate=0.0, **given)
    else:
        strategy = dare(strategy, **given)
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=rounds)
    return sent(outcomes), outcomes


def test_a_small_model_sends_every_value(memory_grid, toys):
    found, outcomes = run(memory_grid(moving(toys, 0.5), 3), toys)
    assert found[0] == (0, "b4")
    assert all(rate == 0 for rate, _ in found)
    whole, _ = run(memory_grid(moving(toys, 0.5), 3), toys, drop_rate=0, values="i8")
    assert all(rate == 0 for rate, _ in whole)
    assert max(outcome.measurements["noise"] for outcome in outcomes) < QUIET


def test_a_large_model_sends_more_once_training_moves_it_by_its_own_size(
    memory_grid, toys, large, caplog
):
    with caplog.at_level(logging.INFO, "flwr"):
        found, outcomes = run(memory_grid(moving(toys, 0.5), 3), toys)
    assert found[0] == (0.9, "b1")
    assert outcomes[0].measurements["noise"] > LOUD
    assert found[1][0] < 0.9
    assert outcomes[1].measurements["noise"] < QUIET * 1.5
    assert "from round 2 on: drop_rate=" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_fine_tuning_stays_where_it_began(memory_grid, toys, large):
    found, outcomes = run(memory_grid(toys.app(), 3), toys)
    assert found == [(0.9, "b1")] * ROUNDS
    assert all(o.measurements["noise_of_change"] < auto.OF_CHANGE for o in outcomes)


def test_words_leave_less_to_choose(memory_grid, toys, large):
    grid = memory_grid(moving(toys, 0.5), 3)
    found, _ = run(grid, toys, values="i8")
    assert found[0] == (0.9, "i8") and {values for _, values in found} == {"i8"}
    assert found[1][0] < 0.9
    fixed, _ = run(memory_grid(moving(toys, 0.5), 3), toys, drop_rate=0.9)
    assert fixed == [(0.9, "b1")] * ROUNDS


def test_a_budget_is_the_most_and_what_it_lacks_is_told_once(memory_grid, toys, large, caplog):
    def limited(nbytes):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "flwr"):
            _, outcomes = run(
                memory_grid(moving(toys, 1.0), 2),
                toys,
                upload_budget=UploadBudget(nbytes=nbytes),
                dense=["^head"],
            )
        for outcome in outcomes:
            for parts in zip(
                outcome.measurements["update_bytes"],
                outcome.measurements["dense_bytes"],
                strict=True,
            ):
                assert sum(parts) <= nbytes
        return outcomes, [r.getMessage() for r in caplog.records if "noise" in r.getMessage()]

    outcomes, said = limited(600)
    assert len(said) == 1 and said[0].startswith("round 2: ")
    told = [outcome.measurements.get("noise_warning") for outcome in outcomes]
    assert told == [None, said[0].removeprefix("round 2: "), None, None]
    name = re.search(r"\d+ % of it in '(.+?)'", said[0])[1]
    assert name in toys.arrays()
    asked = int(re.search(r"an upload_budget of at least (\d+) bytes$", said[0])[1])
    outcomes, said = limited(asked)
    assert not said
    assert outcomes[-1].measurements["noise"] <= QUIET * 1.5


def kept_run(grid, toys, folder, *, stop_after=None, base=None, **words):
    """Start or go on with a run in ``folder``; returns its outcomes and its final version."""
    kept, outcomes = StateFolder(folder / "rounds"), []

    def hook(outcome):
        outcomes.append(outcome)
        save(strategy, kept, outcome)
        return outcome.round == stop_after

    on_disk = {"base": base, "state": folder / "versions"} if base else words
    strategy = DareStrategy(seed=1, fraction_evaluate=0.0, round_hook=hook, **on_disk)
    resumed = resume(strategy, kept)
    if resumed is None:
        initial, start, state = (None if base else toys.record(toys.arrays())), 1, None
        keep_base(kept, initial or strategy)
    else:
        initial, start, state = resumed.arrays, resumed.round + 1, resumed.step_state
    strategy.start(grid, initial, num_rounds=ROUNDS, start_round=start, step_state=state)
    return outcomes, strategy.outcome.model.ref.version


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_goes_on_with_its_terms(memory_grid, toys, large, tmp_path, stop):
    whole, version = kept_run(memory_grid(moving(toys, 0.5), 3), toys, tmp_path / "a")
    first, _ = kept_run(memory_grid(moving(toys, 0.5), 3), toys, tmp_path / "b", stop_after=stop)
    rest, resumed = kept_run(memory_grid(moving(toys, 0.5), 3, shuffle=5), toys, tmp_path / "b")
    assert resumed == version
    assert sent(first) + sent(rest) == sent(whole)
    assert len(set(sent(whole))) > 1


def test_a_base_on_disk_chooses_as_arrays_do(memory_grid, toys, large, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    write_checkpoint(tmp_path / "base", toys.arrays())
    base = tmp_path / "base"

    def grid():
        return memory_grid(
            moving(toys, 0.5),
            3,
            node_config=lambda p: {"partition-id": p, "num-partitions": 3, "base": str(base)},
        )

    streamed, version = kept_run(grid(), toys, tmp_path / "a", base=base)
    assert sent(streamed)[0] == (0.9, "b1")
    assert sent(streamed)[1][0] < 0.9
    for outcome in streamed:
        assert outcome.measurements["noise"] is not None
    kept_run(grid(), toys, tmp_path / "b", base=base, stop_after=2)
    rest, resumed = kept_run(grid(), toys, tmp_path / "b", base=base)
    assert resumed == version
    assert sent(rest) == sent(streamed)[2:]


@pytest.mark.parametrize("downlink", ["auto", "union-b1"])
def test_terms_may_change_between_steps_that_clients_draw_again(memory_grid, toys, large, downlink):
    found, outcomes = run(memory_grid(moving(toys, 0.5), 3), toys, downlink=make_downlink(downlink))
    assert len(set(found)) > 1
    assert all(outcome.measurements["accepted"] == 3 for outcome in outcomes)


def test_flowers_strategies(memory_grid, toys, large):
    grid = memory_grid(moving(toys, 0.5), 3)
    found, _ = run(grid, toys, FedAvg(fraction_evaluate=0.0, min_available_nodes=3))
    assert found[0] == (0.9, "b1") and found[1][0] < 0.9
    grid = memory_grid(moving(toys, 0.5), 3)
    found, outcomes = run(grid, toys, FedAdam(fraction_evaluate=0.0, min_available_nodes=3))
    assert found == [(0.9, "b1")] * ROUNDS
    assert [o.measurements["noise"] for o in outcomes] == [None] * ROUNDS
    grid = memory_grid(moving(toys, 0.0), 3)
    found, _ = run(grid, toys, FedMedian(fraction_evaluate=0.0, min_available_nodes=3))
    assert found == [(0, "b4")] * ROUNDS
    with pytest.raises(ConfigError, match="compares clients' updates"):
        dare(FedMedian(), values="b1")


@pytest.mark.parametrize("lie", [0.0, 1e30, float("nan"), float("inf")])
def test_a_client_that_lies_about_its_norm_moves_nobody_far(
    memory_grid, toys, large, monkeypatch, lie
):
    """Of five clients one lies: the others' terms are at most one step from the honest run's."""
    honest, _ = run(memory_grid(moving(toys, 0.1), 5), toys)
    honestly = Receipt.of

    def lying(plan, **words):
        if plan.client == 0:
            words["delta_norm"] = lie
        return honestly(plan, **words)

    monkeypatch.setattr(update_answer.Receipt, "of", staticmethod(lying))
    found, outcomes = run(memory_grid(moving(toys, 0.1), 5), toys)
    assert any(outcome.measurements["accepted"] == 5 for outcome in outcomes)
    table = auto.choices(outcomes[0].model.groups.layout).every
    places = {(round(one.drop_rate.p, 6), one.values): n for n, one in enumerate(table)}
    for ours, theirs in zip(honest, found, strict=True):
        assert abs(places[ours] - places[theirs]) <= 1
