"""Replies that lie in memory already, as in a simulation: looked at no closer than it pays."""

import time
import tracemalloc

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from replies import EDITS
from toy import toy_app, toy_arrays

from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import DareStrategy
from dare_agg.flower.exchange import exchange
from dare_agg.flower.limits import MAX_KEYS, OWN_BYTES, ReplyLimit
from dare_agg.flower.records import REPLY_KEY, UPDATE_KEY, failure_of
from simulations.runs.memory_grid import MemoryGrid


class Holding:
    """A grid that has the replies ready."""

    def __init__(self, *replies):
        self.replies = list(replies)

    def push_messages(self, messages):
        return [str(number) for number, _ in enumerate(messages)]

    def pull_messages(self, ids):
        return [self.replies[int(number)] for number in ids]


def answer(content, limit=ReplyLimit(50_000)):  # noqa: B008
    """What a server takes of a reply with this content."""
    asked = Message(RecordDict(), 7, "train")
    ((_, reply),) = exchange(Holding(Message(content, reply_to=asked)), [asked], 60, limit)
    return reply


@pytest.mark.parametrize("name", EDITS)
def test_more_than_was_asked_for_costs_nothing(name):
    content = RecordDict({REPLY_KEY: ConfigRecord(), "metrics": MetricRecord({"num-examples": 9})})
    EDITS[name](content)
    tracemalloc.start()
    try:
        began = time.process_time()
        reply = answer(content)
        seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert failure_of(reply)[0] == "oversized"
    assert seconds < 1 and peak < 64_000_000


def test_what_apps_send_beside_an_update_passes():
    """A thousand classes' metrics, arrays of their own; and all that a limit leaves room for."""
    own = RecordDict({
        "metrics": MetricRecord({f"class-{number}/recall": 0.5 for number in range(1000)}),
        "history": MetricRecord({"loss": [0.5] * 10_000}),
        "prototypes": ArrayRecord({str(n): Array(toy_arrays()["head.weight"]) for n in range(100)}),
        "notes": ConfigRecord({"names": ["a name"] * 1000, "raw": bytes(100_000), "fine": True}),
    })  # fmt: skip
    assert not answer(own, ReplyLimit()).has_error()
    full = RecordDict({"x": ArrayRecord({"0": Array("uint8", (1,), "", bytes(OWN_BYTES))})})
    assert not answer(full, ReplyLimit()).has_error()
    for size, most in ((OWN_BYTES + 1, ReplyLimit()), (2_000, ReplyLimit(own=1_000))):
        full["x"]["0"] = Array("uint8", (1,), "", bytes(size))
        assert failure_of(answer(full, most))[0] == "oversized"


def test_as_many_metrics_as_there_may_be_cost_less_than_a_second():
    """They are signed, counted and averaged; each was walked through many times over."""

    def tamper(client, reply):
        if client == 0 and UPDATE_KEY in reply.content:
            many = {f"k{number}": 1.0 for number in range(MAX_KEYS - 100)}
            reply.content["metrics"] = MetricRecord({"num-examples": 10, **many})
        return reply

    grid, seconds = MemoryGrid(toy_app(), 4, tamper=tamper), []
    for _ in range(2):
        strategy = DareStrategy(seed=1, fraction_evaluate=0.0)
        arrays = ArrayRecord({name: Array(array) for name, array in toy_arrays().items()})
        began = time.process_time()
        strategy.start(grid, arrays, num_rounds=1)
        seconds.append(time.process_time() - began)
        assert strategy.outcome.measurements["accepted"] == 4
    assert min(seconds) < 2  # the client's own work is in it


def test_what_a_grid_raises_over_one_reply():
    class Raising(MemoryGrid):
        def pull_messages(self, ids):
            for message in (replies := super().pull_messages(ids)):
                if self.partitions[message.metadata.src_node_id] == 0:
                    raise RecursionError("maximum\nrecursion depth")
            return replies

    arrays = ArrayRecord({name: Array(array) for name, array in toy_arrays().items()})
    strategy = DareStrategy(seed=1, min_available_nodes=3)
    strategy.start(Raising(toy_app(), 4), arrays, num_rounds=2)
    assert strategy.outcome.measurements["accepted"] == 3  # it did not even say who it is


@pytest.mark.parametrize("error", [ConnectionError("gone"), ConfigError("not so")])
def test_what_a_grid_raises_for_itself(error):
    class Broken(Holding):
        def pull_messages(self, ids):
            raise error

    with pytest.raises(type(error)):
        list(exchange(Broken(), [Message(RecordDict(), 7, "train")], 60))


def test_the_room_is_the_apps_to_set():
    def tamper(client, reply):
        if UPDATE_KEY in reply.content:
            reply.content["own"] = ArrayRecord({"x": Array("uint8", (1,), "", bytes(2 << 20))})
        return reply

    arrays = ArrayRecord({name: Array(array) for name, array in toy_arrays().items()})

    def start(**words):
        strategy = DareStrategy(seed=1, fraction_evaluate=0.0, **words)
        strategy.start(MemoryGrid(toy_app(), 4, tamper=tamper), arrays, num_rounds=1)
        return strategy.outcome.measurements["accepted"]

    with pytest.raises(RunError, match="oversized ×4"):
        start()
    assert start(reply_room=3 << 20) == 4
    with pytest.raises(ConfigError, match="reply_room"):
        DareStrategy(reply_room=-1)
