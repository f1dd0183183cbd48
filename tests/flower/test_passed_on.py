"""What an override passes on counts; what does not, and why."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from flwr.app import Array, Error, Message, RecordDict
from strategy_runs import arrays_after
from toy import numpy_of

from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import DareStrategy, dare_mod
from dare_agg.flower.records import UPDATE_KEY
from simulations.runs.memory_grid import MemoryGrid


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

    arrays = arrays_after(EveryOther(seed=1), MemoryGrid(toys.app(), 2), toys, rounds=1)
    assert np.array_equal(arrays["encoder.weight"], toys.arrays()["encoder.weight"])
    arrays = arrays_after(EveryOther(seed=1), MemoryGrid(toys.app(), 2), toys, rounds=2)
    assert not np.array_equal(arrays["encoder.weight"], toys.arrays()["encoder.weight"])
