"""Subclasses and wrappers of the strategy see and do what those of FedAvg see and do."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg, Strategy
from habits import (
    DENSE,
    FLOATS,
    HABITS,
    KeepsTheOldModelOnce,
    MakesPlainMessages,
    MergesByItself,
    MovesHalfTheWay,
    assert_equal,
    with_extra,
)
from toy import numpy_of, record_of

from dare_agg.downlink.ways import make_downlink
from dare_agg.flower import DareStrategy, dare_mod
from dare_agg.flower.records import REPLY_KEY
from simulations.runs.memory_grid import MemoryGrid


@pytest.fixture
def side_by_side(toys):
    """Runs a habit over both strategies; returns both results and strategies."""

    def run(habit, loop=None, rounds=3, clients=4, tamper=None):
        found = []
        for base, words, mods in ((FedAvg, {}, []), (DareStrategy, DENSE, [dare_mod])):
            strategy = type("Mine", (habit, base), {})(fraction_evaluate=0.0, **words)
            strategy.names, strategy.seen = list(toys.arrays()), []
            grid = MemoryGrid(with_extra(mods), clients, tamper=tamper)
            start = loop or type(strategy).start
            result = start(strategy, grid, toys.record(toys.arrays()), num_rounds=rounds)
            found.append((result, strategy))
        return found

    return run


@pytest.mark.parametrize("habit", HABITS)
def test_a_subclass_does_what_it_does_over_fedavg(side_by_side, habit):
    (flowers, fedavg), (ours, dare) = side_by_side(habit)
    assert_equal(flowers, ours)
    assert len(dare.seen) == len(fedavg.seen)
    key = lambda row: row[:2]  # noqa: E731
    for (a, b, theirs), (c, d, mine) in zip(
        sorted(fedavg.seen, key=key), sorted(dare.seen, key=key), strict=True
    ):
        assert (a, b) == (c, d)
        for name in FLOATS:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("habit", [h for h in HABITS if h is not MakesPlainMessages])
def test_the_same_in_flowers_own_loop(side_by_side, habit):
    (flowers, _), (ours, _) = side_by_side(habit, loop=Strategy.start)
    assert_equal(flowers, ours)


class Wrapper(Strategy):
    """A strategy around a strategy, in the manner of Flower's own wrappers."""

    def __init__(self, strategy):
        self.strategy = strategy
        self.looked = 0

    def summary(self):
        self.strategy.summary()

    def configure_train(self, server_round, arrays, config, grid):
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            for name, record in list(reply.content.array_records.items()):
                halved = {n: np.asarray(a * 0.5, a.dtype) for n, a in numpy_of(record).items()}
                reply.content[name] = record_of(halved)
                self.looked += 1
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(self, server_round, arrays, config, grid):
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round, replies):
        replies = list(replies)
        assert all(set(reply.content) == {"metrics", "info"} for reply in replies)
        return self.strategy.aggregate_evaluate(server_round, replies)


def test_a_wrapper_does_what_it_does_around_fedavg(toys):
    results = []
    for strategy, mods in ((FedAvg(), []), (DareStrategy(**DENSE), [dare_mod])):
        wrapper, grid = Wrapper(strategy), MemoryGrid(with_extra(mods), 4)
        results.append(wrapper.start(grid, toys.record(toys.arrays()), num_rounds=3))
        assert wrapper.looked == 12
        assert not {"push_messages", "pull_messages"} & set(vars(grid))  # the grid is as it was
    assert_equal(*results)
    flowers, ours = (result.evaluate_metrics_clientapp for result in results)
    assert {n: dict(m) for n, m in ours.items()} == {n: dict(m) for n, m in flowers.items()}


def test_a_loop_of_the_apps_own(toys):
    """configure_train, send_and_receive, aggregate_train by hand; and pushed and pulled."""
    found = []
    for strategy, mods in ((FedAvg(), []), (DareStrategy(**DENSE), [dare_mod])):
        grid, arrays = MemoryGrid(with_extra(mods), 3), toys.record(toys.arrays())
        for number in (1, 2):
            messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
            if number == 1:
                replies = grid.send_and_receive(messages, timeout=30)
            else:
                ids, replies = list(grid.push_messages(messages)), []
                while len(replies) < 3:
                    replies += grid.pull_messages(ids)
            for reply in replies:
                assert set(reply.content) == {"arrays", "metrics", "info"}
            arrays, _ = strategy.aggregate_train(number, replies)
        found.append(numpy_of(arrays))
    for name in FLOATS:
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("habit", [MovesHalfTheWay, MergesByItself, KeepsTheOldModelOnce])
def test_kept_versions_follow_what_an_override_returns(toys, habit):
    held = []

    def watch(partition, reply):
        held.append(reply.content[REPLY_KEY].get("refused"))
        return reply

    class Mine(habit, DareStrategy):
        pass

    outcomes = []
    words = {**DENSE, "round_hook": outcomes.append, "downlink": make_downlink("lossless")}
    strategy, grid = Mine(**words), MemoryGrid(toys.app(), 3, tamper=watch)
    result = strategy.start(grid, toys.record(toys.arrays()), num_rounds=4)
    full = type("Full", (habit, DareStrategy), {})(**DENSE)
    expected = full.start(MemoryGrid(toys.app(), 3), toys.record(toys.arrays()), num_rounds=4)
    for name in FLOATS:
        np.testing.assert_allclose(
            numpy_of(result.arrays)[name], numpy_of(expected.arrays)[name], rtol=0, atol=1e-5
        )
    assert not any(held)  # nobody lost a version
    assert len(outcomes) == 4
    for name, array in numpy_of(result.arrays).items():
        assert array.tobytes() == outcomes[-1].model.arrays()[name].tobytes()


def test_the_hook_hears_of_rounds_that_an_override_merges(toys):
    outcomes = []

    class Mine(MergesByItself, DareStrategy):
        pass

    strategy = Mine(seed=1, fraction_evaluate=0.0, round_hook=outcomes.append)
    strategy.start(MemoryGrid(toys.app(), 3), toys.record(toys.arrays()), num_rounds=2)
    assert [o.measurements["accepted"] for o in outcomes] == [3, 3]
    assert outcomes[-1].train_metrics["clients"] == 3
