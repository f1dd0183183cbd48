"""Subclasses and wrappers of the strategy see and do what those of FedAvg see and do."""

from __future__ import annotations

import copy
import logging
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy

from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import DareStrategy, dare_mod, decoded
from dare_agg.flower.records import REPLY_KEY, UPDATE_KEY
from simulations.runs.memory_grid import MemoryGrid

DENSE = {"drop_rate": 0, "values": "f32", "dense_values": "f32", "seed": 7}
FLOATS = ("encoder.weight", "encoder.bias", "norm.running_mean", "norm.running_var", "head.weight")


def numpy_of(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}


def record_of(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


# --- habits of users: each is laid over FedAvg and over DareStrategy -------------------------


class Looks:
    """Reads everything, keeps copies, passes all on."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            arrays, metrics = reply.content["arrays"], reply.content["metrics"]
            assert list(arrays) == list(self.names) and len(reply.content.array_records) == 1
            assert all(a.dtype == str(a.numpy().dtype) for a in arrays.values())
            assert all(a.shape == a.numpy().shape for a in arrays.values())
            self.seen.append((server_round, metrics["num-examples"], numpy_of(arrays)))
        return super().aggregate_train(server_round, replies)


class LeavesSmallOnesOut:
    def aggregate_train(self, server_round, replies):
        kept = [r for r in replies if r.has_content() and r.content["metrics"]["num-examples"] > 10]
        return super().aggregate_train(server_round, kept)


class Scales:
    """Puts other arrays in the place of a client's, one tensor by one."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            if reply.content["metrics"]["num-examples"] > 20:
                continue
            record = reply.content["arrays"]
            record["encoder.bias"] = Array(np.float32(0.5) * record["encoder.bias"].numpy())
        return super().aggregate_train(server_round, replies)


class ReplacesAll:
    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            clipped = {
                n: np.asarray(np.clip(a, -1, 1))
                for n, a in numpy_of(reply.content["arrays"]).items()
            }
            reply.content = RecordDict({**reply.content, "arrays": record_of(clipped)})
        return super().aggregate_train(server_round, replies)


class Copies:
    """Works on copies of its own."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            reply.content = RecordDict(dict(reply.content))
            reply.content["arrays"] = copy.deepcopy(reply.content["arrays"])
        return super().aggregate_train(server_round, replies)


class WeighsAlike:
    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for reply in replies:
            reply.content["metrics"]["num-examples"] = 1
        return super().aggregate_train(server_round, replies)


class MovesHalfTheWay:
    """Changes what was merged, as server-side momentum or noise does."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        half = {n: (self.before[n] + a) / 2 for n, a in numpy_of(arrays).items()}
        half = {n: np.asarray(a, numpy_of(arrays)[n].dtype) for n, a in half.items()}
        return record_of(half), metrics

    def configure_train(self, server_round, arrays, config, grid):
        self.before = numpy_of(arrays)
        return super().configure_train(server_round, arrays, config, grid)


class KeepsTheOldModelOnce:
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return (None if server_round == 2 else arrays), metrics


class MergesByItself:
    """No word of super: the plain mean of what the clients sent."""

    def aggregate_train(self, server_round, replies):
        rows = [numpy_of(r.content["arrays"]) for r in replies if r.has_content()]
        mean = {
            n: np.asarray(np.mean([row[n] for row in rows], 0), rows[0][n].dtype) for n in rows[0]
        }
        return record_of(mean), MetricRecord({"clients": len(rows)})


class MergesWithTheStrategysFunctions(MergesByItself):
    """By itself, and the metrics by the function that the strategy was made with, or has."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        arrays, _ = super().aggregate_train(server_round, replies)
        contents = [reply.content for reply in replies]
        return arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)


class AsksThree:
    def configure_train(self, server_round, arrays, config, grid):
        messages = super().configure_train(server_round, arrays, config, grid)
        # FedAvg draws nodes at random: which three is told by what they are.
        return [m for m in messages if grid.partitions[m.metadata.dst_node_id] != 3]


class TellsEachItsOwn:
    """Another config for each client, in messages made anew from those of super."""

    def configure_train(self, server_round, arrays, config, grid):
        for message in super().configure_train(server_round, arrays, config, grid):
            node = message.metadata.dst_node_id
            own = ConfigRecord({**message.content["config"], "extra": float(grid.partitions[node])})
            content = RecordDict({**message.content, "config": own})
            yield Message(content, dst_node_id=node, message_type="train")


class MakesPlainMessages:
    """Samples and writes messages as if there were FedAvg alone."""

    def configure_train(self, server_round, arrays, config, grid):
        own = ConfigRecord({"server-round": server_round, "extra": 2.0})
        content = RecordDict({"arrays": arrays, "config": own})
        nodes = [node for node in grid.get_node_ids() if grid.partitions[node] < 3]
        return [Message(content, dst_node_id=node, message_type="train") for node in nodes]


class MakesPlainMessagesForSupers:
    """The same for the nodes that super drew."""

    def configure_train(self, server_round, arrays, config, grid):
        drawn = super().configure_train(server_round, arrays, config, grid)
        own = ConfigRecord({"server-round": server_round, "extra": 3.0})
        content = RecordDict({"arrays": arrays, "config": own})
        return [Message(content, m.metadata.dst_node_id, "train") for m in drawn]


class ChangesTheMergedRecord(MovesHalfTheWay):
    """Puts what it makes into the record that super returned."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super(MovesHalfTheWay, self).aggregate_train(server_round, replies)
        for name in FLOATS:
            half = (self.before[name] + arrays[name].numpy()) / 2
            arrays[name] = Array(half.astype(np.float32))
        return arrays, metrics


class UsesThePiecesOfFedAvg:
    """Merges as Flower's own strategies do, by what they inherit of FedAvg."""

    def configure_train(self, server_round, arrays, config, grid):
        config["server-round"] = server_round
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return self._construct_messages(content, list(grid.get_node_ids()), "train")

    def aggregate_train(self, server_round, replies):
        valid, errors = self._check_and_log_replies(replies, is_train=True)
        assert not errors
        contents = [reply.content for reply in valid]
        arrays, _ = MergesByItself.aggregate_train(self, server_round, valid)
        return arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)


HABITS = [
    Looks, LeavesSmallOnesOut, Scales, ReplacesAll, Copies, WeighsAlike, MovesHalfTheWay,
    KeepsTheOldModelOnce, MergesByItself,
    MergesWithTheStrategysFunctions, AsksThree, TellsEachItsOwn, MakesPlainMessages,
    MakesPlainMessagesForSupers, ChangesTheMergedRecord, UsesThePiecesOfFedAvg,
]  # fmt: skip


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


def with_extra(mods):
    """The toy app; what its config calls "extra" is added to the bias."""
    from toy import toy_delta

    app = ClientApp(mods=mods)

    @app.train()
    def train(msg, context):
        partition = int(context.node_config["partition-id"])
        config = msg.content["config"]
        tuned = {}
        for name, array in numpy_of(msg.content["arrays"]).items():
            if array.dtype.kind == "f":
                array = array + toy_delta(name, array.shape, partition, int(config["server-round"]))
            if name == "encoder.bias":
                array = array + np.float32(config.get("extra", 0.0))
            tuned[name] = np.asarray(array)
        metrics = MetricRecord({"num-examples": 10 * (partition + 1), "loss": 1 / (partition + 1)})
        own = ConfigRecord({"device": "cpu"})
        content = {"arrays": record_of(tuned), "metrics": metrics, "info": own}
        return Message(RecordDict(content), reply_to=msg)

    @app.evaluate()
    def evaluate(msg, context):
        content = {
            "metrics": MetricRecord({"num-examples": 5, "accuracy": 0.75}),
            "info": ConfigRecord({"device": "cpu"}),
        }
        return Message(RecordDict(content), reply_to=msg)

    return app


def assert_equal(flowers, ours):
    expected, found = numpy_of(flowers.arrays), numpy_of(ours.arrays)
    assert list(found) == list(expected)
    for name in FLOATS:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=3e-6, err_msg=name)
    assert set(ours.train_metrics_clientapp) == set(flowers.train_metrics_clientapp)
    for number, metrics in flowers.train_metrics_clientapp.items():
        assert dict(ours.train_metrics_clientapp[number]) == pytest.approx(dict(metrics))


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


# --- nothing is decoded that nobody looks at, and looking changes no bit ----------------------


def small(strategy, grid, toys, rounds=2):
    return numpy_of(strategy.start(grid, toys.record(toys.arrays()), num_rounds=rounds).arrays)


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

    plain = small(DareStrategy(**words), MemoryGrid(app(), 4), toys)
    passing = PassesOn(**words)
    passed = small(passing, MemoryGrid(app(), 4), toys)
    assert not reads and passing.calls == 8
    looked = small(Reads(**words), MemoryGrid(app(), 4), toys)
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


# --- what does not count, and why -------------------------------------------------------------


def outcome_of(toys, change, clients=4, tamper=None, **words):
    """One round in which ``change(replies)`` makes what is passed on; returns its outcome."""

    class Mine(DareStrategy):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, change(list(replies)))

    strategy = Mine(seed=1, fraction_evaluate=0.0, **words)
    grid = MemoryGrid(toys.app(), clients, tamper=tamper)
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    return strategy.outcome


def reasons(outcome):
    return [(rejection.client, rejection.reason) for rejection in outcome.rejections]


def test_replies_come_in_the_order_of_clients_and_failures_as_errors(toys):
    seen = []

    def look(replies):
        seen.extend(replies)
        return replies

    def tamper(partition, reply):
        if UPDATE_KEY not in reply.content:
            return reply
        if partition == 1:
            reply.content[UPDATE_KEY]["0"].data = b"\0" * len(reply.content[UPDATE_KEY]["0"].data)
        return None if partition == 2 else reply

    outcome = outcome_of(toys, look, 5, tamper, deadline=2.0)
    assert [r.has_error() for r in seen] == [False, True, False, False]
    examples = [r.content["metrics"]["num-examples"] for r in seen if r.has_content()]
    assert examples == [10, 40, 50]
    assert "malformed" in seen[1].error.reason or "checksum" in seen[1].error.reason
    assert [client for client, _ in reasons(outcome)] == [1, 2]
    assert outcome.measurements["accepted"] == 3


def test_what_is_left_out_does_not_count_and_is_listed(toys):
    outcome = outcome_of(toys, lambda replies: replies[1:3])
    assert outcome.measurements["clients"] == ["1", "2"]
    assert reasons(outcome) == [(0, "left-out"), (3, "left-out")]
    with pytest.raises(RunError, match=r"0 of 4 .*left-out ×4"):
        outcome_of(toys, lambda replies: [])


def test_the_same_twice_counts_once_and_two_different_not_at_all(toys):
    outcome = outcome_of(toys, lambda replies: [*replies, replies[0]])
    assert outcome.measurements["accepted"] == 4 and outcome.measurements["duplicates"] == 1

    def other(replies):
        content = RecordDict(dict(replies[0].content))
        twin = copy.copy(replies[0])
        twin.__dict__["_content"] = content
        return [*replies, twin]

    outcome = outcome_of(toys, other)
    assert outcome.measurements["accepted"] == 3 and reasons(outcome) == [(0, "duplicate")]


def test_messages_that_no_client_sent_are_refused(toys):
    def made(replies):
        made = Message(RecordDict(dict(replies[0].content)), reply_to=replies[0])
        return [*replies[1:], made]

    outcome = outcome_of(toys, made)
    assert outcome.measurements["accepted"] == 3
    assert (-1, "unknown-node") in reasons(outcome) and (0, "left-out") in reasons(outcome)


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("encoder.bias", np.full(25, np.nan, np.float32), "non-finite"),
        ("encoder.bias", np.zeros(24, np.float32), "layout"),
        ("encoder.bias", np.array(["a"] * 25), "layout"),
        ("stranger", np.zeros(3, np.float32), "layout"),
    ],
)
def test_arrays_that_cannot_be_merged_are_refused(toys, name, array, reason):
    def change(replies):
        replies[2].content["arrays"][name] = Array(array)
        return replies

    outcome = outcome_of(toys, change)
    assert reasons(outcome) == [(2, reason)] and outcome.measurements["accepted"] == 3


def test_a_reply_without_arrays_or_weight_is_refused(toys):
    def change(replies):
        del replies[0].content["arrays"]
        del replies[1].content["metrics"]["num-examples"]
        replies[2].content["metrics"]["num-examples"] = -1
        return replies

    assert reasons(outcome_of(toys, change)) == [(0, "layout"), (1, "weight"), (2, "weight")]


def test_tensors_that_are_taken_out_count_as_unchanged(toys):
    def change(replies):
        for reply in replies:
            del reply.content["arrays"]["encoder.bias"]
        return replies

    arrays = numpy_of(outcome_of(toys, change).arrays)
    assert np.array_equal(arrays["encoder.bias"], toys.arrays()["encoder.bias"])
    assert not np.array_equal(arrays["encoder.weight"], toys.arrays()["encoder.weight"])


def test_weights_are_the_apps_own_code_to_give(toys):
    """A client that reports none counts where the strategy's code says what it weighs."""

    def tamper(partition, reply):
        if partition == 1 and UPDATE_KEY in reply.content:
            del reply.content["metrics"]["num-examples"]
        return reply

    def weigh(replies):
        for reply in replies:
            reply.content["metrics"].setdefault("num-examples", 20)
        return replies

    assert reasons(outcome_of(toys, lambda replies: replies, tamper=tamper)) == [(1, "weight")]
    assert outcome_of(toys, weigh, tamper=tamper).measurements["examples"] == [10, 20, 30, 40]


def test_errors_of_the_apps_own_making_do_not_count(toys):
    def change(replies):
        return [*replies[1:], Message(Error(0, "too small"), reply_to=replies[0])]

    assert reasons(outcome_of(toys, change)) == [(0, "left-out")]


def test_arrays_stand_under_the_key_that_the_app_returned_them_under(toys):
    def rename(msg, context, call_next):
        reply = call_next(msg, context)
        if "arrays" in reply.content:
            reply.content["weights"] = reply.content.pop("arrays")
        return reply

    class Mine(DareStrategy):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            assert all(list(reply.content["weights"]) == list(toys.arrays()) for reply in replies)
            replies[0].content["weights"]["encoder.bias"] = Array(np.zeros(25, np.float32))
            return super().aggregate_train(server_round, replies)

    strategy = Mine(seed=1, fraction_evaluate=0.0)
    grid = MemoryGrid(toys.app([dare_mod, rename]), 3)
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    assert strategy.outcome.measurements["accepted"] == 3


def test_another_model_for_a_client_is_refused_before_it_trains(toys):
    class Mine(DareStrategy):
        def configure_train(self, server_round, arrays, config, grid):
            messages = list(super().configure_train(server_round, arrays, config, grid))
            messages[1].content["arrays"] = toys.record(toys.arrays(seed=1))
            return messages

    strategy = Mine(seed=1)
    with pytest.raises(ConfigError, match="other arrays than the global model"):
        strategy.start(MemoryGrid(toys.app(), 3), toys.record(toys.arrays()), num_rounds=1)


def test_a_node_that_is_not_there_is_refused(toys):
    class Mine(DareStrategy):
        def configure_train(self, server_round, arrays, config, grid):
            content = RecordDict({"arrays": arrays, "config": config})
            return [Message(content, 4242, "train")]

    with pytest.raises(ConfigError, match="asks node 4242, which is not online"):
        Mine(seed=1).start(MemoryGrid(toys.app(), 3), toys.record(toys.arrays()), num_rounds=1)


def test_replies_without_a_round_are_refused(toys):
    class Twice(DareStrategy):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            super().aggregate_train(server_round, replies[:2])
            return super().aggregate_train(server_round, replies[2:])

    with pytest.raises(ConfigError, match="one aggregate_train for each"):
        Twice(seed=1).start(MemoryGrid(toys.app(), 3), toys.record(toys.arrays()), num_rounds=1)


def test_a_round_that_asks_nobody_changes_nothing(toys):
    class EveryOther(DareStrategy):
        def configure_train(self, server_round, arrays, config, grid):
            messages = super().configure_train(server_round, arrays, config, grid)
            return [] if server_round == 1 else messages

    arrays = small(EveryOther(seed=1), MemoryGrid(toys.app(), 2), toys, rounds=1)
    assert np.array_equal(arrays["encoder.weight"], toys.arrays()["encoder.weight"])
    arrays = small(EveryOther(seed=1), MemoryGrid(toys.app(), 2), toys, rounds=2)
    assert not np.array_equal(arrays["encoder.weight"], toys.arrays()["encoder.weight"])


# --- the model after an override, downlinks, hooks --------------------------------------------


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


# --- metrics and the log ----------------------------------------------------------------------


def test_metrics_functions_see_the_whole_content(toys):
    def of_training(contents, key):
        assert all(isinstance(content, RecordDict) for content in contents)
        assert all(list(content["arrays"]) == list(toys.arrays()) for content in contents)
        first = [float(content["arrays"]["encoder.bias"].numpy()[0]) for content in contents]
        cpus = sum(content["info"]["device"] == "cpu" for content in contents)
        total = sum(content["metrics"][key] for content in contents)
        return MetricRecord({"cpus": cpus, "examples": total, "first": sum(sorted(first))})

    def of_evaluation(contents, key):
        cpus = sum(content["info"]["device"] == "cpu" for content in contents)
        return MetricRecord({"cpus": cpus, "examples": sum(c["metrics"][key] for c in contents)})

    results = []
    for base, words, mods in ((FedAvg, {}, []), (DareStrategy, DENSE, [dare_mod])):
        strategy = base(
            train_metrics_aggr_fn=of_training, evaluate_metrics_aggr_fn=of_evaluation, **words
        )
        grid = MemoryGrid(with_extra(mods), 4)
        results.append(strategy.start(grid, toys.record(toys.arrays()), num_rounds=2))
    flowers, ours = results
    assert_equal(flowers, ours)
    assert {n: dict(m) for n, m in ours.evaluate_metrics_clientapp.items()} == {
        n: dict(m) for n, m in flowers.evaluate_metrics_clientapp.items()
    }


def test_the_log_shows_metrics_as_flowers_does(toys, caplog):
    lines = []
    for base, words, mods in ((FedAvg, {}, []), (DareStrategy, DENSE, [dare_mod])):
        caplog.clear()
        with caplog.at_level(logging.INFO, "flwr"):
            base(**words).start(
                MemoryGrid(with_extra(mods), 2),
                toys.record(toys.arrays()),
                num_rounds=2,
                train_config=ConfigRecord({"lr": 0.1}),
                evaluate_fn=lambda number, arrays: MetricRecord({"total": 0.5}),
            )
        lines.append([record.getMessage() for record in caplog.records])
    flowers, ours = lines

    def telling(rows):
        at = rows.index("Final results:")
        words = ("MetricRecord", "Initial global", "Number of rounds", "[ROUND")
        return [row for row in rows[:at] if any(word in row for word in words)], rows[at:]

    assert telling(ours) == telling(flowers)
    assert sum("Aggregated MetricRecord" in row for row in ours) == 4
    assert any("'accuracy': '7.5000e-01'" in row for row in ours)


def test_metrics_are_shown_in_the_clients_order_and_wild_ones_are_named(toys, caplog):
    def edit(partition, tuned, metrics):
        metrics.update({"z": 1.0, "a": 2.0, "curve": [1.0, 2.0]})
        if partition == 1:
            metrics["loss"] = float("nan")

    strategy = DareStrategy(seed=1, fraction_evaluate=0.0)
    grid = MemoryGrid(toys.app(edit=edit), 2)
    result = strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    found = result.train_metrics_clientapp[1]
    assert [key for key in found if key in ("z", "a", "curve")] == ["z", "a", "curve"]
    assert found["curve"] == pytest.approx([1.0, 2.0]) and "loss" not in found
    assert "not every client's are finite numbers: loss" in caplog.text


def test_a_single_number_may_come_back_as_a_vector_of_one(toys):
    def edit(partition, tuned, metrics):
        tuned["scale"] = np.ascontiguousarray(np.float32(1 + partition))

    arrays = {**toys.arrays(), "scale": np.asarray(0, np.float32)}
    strategy = DareStrategy(**DENSE, weighting="equal", fraction_evaluate=0.0)
    grid = MemoryGrid(toys.app(edit=edit), 3)
    scale = numpy_of(strategy.start(grid, toys.record(arrays), num_rounds=1).arrays)["scale"]
    assert scale.shape == () and scale == pytest.approx(2.0)


def test_a_mod_in_front_that_changes_the_model_is_told_its_place(toys):
    def halves(message, context, call_next):
        for name, array in message.content["arrays"].items():
            if array.numpy().dtype.kind == "f":
                message.content["arrays"][name] = Array(array.numpy() * np.float32(0.5))
        return call_next(message, context)

    with pytest.raises(RunError, match=r"a mod in front of it .*mods=\[dare_mod, other_mod\]"):
        strategy = DareStrategy(seed=1, fraction_evaluate=0.0)
        grid = MemoryGrid(with_extra([halves, dare_mod]), 2)
        strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
