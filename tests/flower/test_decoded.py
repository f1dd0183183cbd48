"""Nothing is decoded that nobody looks at, and looking changes no bit."""

from __future__ import annotations

import copy
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array
from strategy_runs import arrays_after
from toy import numpy_of, record_of

from dare_agg.flower import DareStrategy, dare_mod, decoded
from simulations.runs.memory_grid import MemoryGrid


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "fisher"])
def test_looking_changes_no_bit_and_not_looking_decodes_nothing(toys, monkeypatch, method):
    reads = []
    read = decoded._read
    monkeypatch.setattr(decoded, "_read", lambda *a: (reads.append(a[0].name), read(*a))[1])

    class PassesOn(DareStrategy):
        def aggregate_train(self, server_round, replies):
            replies = [reply for reply in replies if reply.has_content()]
            self.calls = getattr(self, "calls", 0) + len(replies)
            return super().aggregate_train(server_round, replies)

    class Reads(PassesOn):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            for reply in replies:
                for array in reply.content["arrays"].values():
                    array.numpy()[...] = 0  # the caller's own
                    assert len(array.data) > 0
            return super().aggregate_train(server_round, replies)

    words = {"seed": 3, "fraction_evaluate": 0.0, "method": method}

    def app():
        if method != "fisher":
            return toys.app()
        return with_fisher()

    plain = arrays_after(DareStrategy(**words), MemoryGrid(app(), 4), toys)
    passing = PassesOn(**words)
    passed = arrays_after(passing, MemoryGrid(app(), 4), toys)
    assert not reads and passing.calls == 8
    looked = arrays_after(Reads(**words), MemoryGrid(app(), 4), toys)
    assert len(reads) > 8
    for name, array in plain.items():
        assert array.tobytes() == passed[name].tobytes() == looked[name].tobytes()


def with_fisher():
    from toy import toy_app

    from dare_agg.flower import STATISTICS_KEY

    def add(msg, context, call_next):
        reply = call_next(msg, context)
        if "config" in reply.content or "arrays" not in reply.content:
            return reply
        values = {n: np.ones_like(a) for n, a in numpy_of(reply.content["arrays"]).items()}
        values = {n: a for n, a in values.items() if a.dtype.kind == "f"}
        reply.content[STATISTICS_KEY] = record_of(values)
        return reply

    return toy_app(mods=[dare_mod, add])


def test_replies_are_looked_at_one_by_one_in_bounded_memory(toys):
    size, clients = 1_000_000, 12
    arrays = {"w": np.zeros((1000, 1000), np.float32)}

    class Reads(DareStrategy):
        def aggregate_train(self, server_round, replies):
            tracemalloc.start()
            norms = [float(np.linalg.norm(r.content["arrays"]["w"].numpy())) for r in replies]
            self.peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert len(norms) == clients and min(norms) > 0
            return super().aggregate_train(server_round, replies)

    strategy = Reads(seed=1, fraction_evaluate=0.0)
    strategy.start(MemoryGrid(toys.app(), clients), toys.record(arrays), num_rounds=1)
    assert strategy.peak < 6 * 4 * size  # not twelve models


def test_arrays_are_arrays(toys):
    """Equality, copies, pickles and assignments of what a reply holds."""

    class Tries(DareStrategy):
        def aggregate_train(self, server_round, replies):
            record = next(iter(replies)).content["arrays"]
            array = record["encoder.bias"]
            plain = Array(array.numpy())
            assert array == plain and plain == array and array != record["norm.running_var"]
            for other in (copy.copy(array), copy.deepcopy(array)):
                assert type(other) is Array and other == array
            assert record.to_numpy_ndarrays()[1].tobytes() == plain.numpy().tobytes()
            array.data = Array(np.zeros(25, np.float32)).data
            assert not array.numpy().any() and array != plain
            self.tried = True
            return None, None

    strategy = Tries(seed=1, fraction_evaluate=0.0)
    strategy.start(MemoryGrid(toys.app(), 2), toys.record(toys.arrays()), num_rounds=1)
    assert strategy.tried
