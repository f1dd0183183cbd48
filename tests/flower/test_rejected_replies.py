"""Replies that do not count: damaged, another's, doubled, or lost on the way."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from strategy_runs import as_instruction, edit_record, is_train, rejected, run

from dare_agg.flower import DareStrategy
from dare_agg.flower.internals import FailureCode
from dare_agg.flower.records import REPLY_KEY, UPDATE_KEY
from dare_agg.flower.workers import WORKER_DIED
from simulations.runs.memory_grid import stamp


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("codec", 99, "version"),
        ("codec", "1", "version"),
        ("package", "0" * 16, "package"),
        ("round", 5, "round"),
        ("plan", bytes(16), "plan"),
    ],
)
def test_receipts_of_another_round_plan_or_code_are_rejected(
    memory_grid, toys, field, value, reason
):
    assert rejected(memory_grid, toys, edit_record(REPLY_KEY, **{field: value})).reason == reason


def test_truncated_oversized_and_missing_payloads_are_rejected(memory_grid, toys):
    def truncate(reply):
        array = reply.content[UPDATE_KEY]["0"]
        array.data = array.data[:-3]
        array.shape = (len(array.data),)
        return reply

    def lie_about_shape(reply):
        reply.content[UPDATE_KEY]["0"].shape = (37 * 2**30,)
        return reply

    def inflate(reply):
        array = reply.content[UPDATE_KEY]["0"]
        array.data = array.data + bytes(10**6)
        array.shape = (len(array.data),)
        return reply

    def drop(reply):
        del reply.content[UPDATE_KEY]
        return reply

    def trailing(reply):
        array = reply.content[UPDATE_KEY]["0"]
        array.data = array.data + b"\0"
        array.shape = (len(array.data),)
        return reply

    assert rejected(memory_grid, toys, truncate).reason == "truncated"
    assert rejected(memory_grid, toys, lie_about_shape).reason == "truncated"
    assert rejected(memory_grid, toys, inflate).reason == "oversized"
    assert rejected(memory_grid, toys, drop).reason == "truncated"
    assert rejected(memory_grid, toys, trailing).reason in ("trailing", "checksum")


def test_full_arrays_instead_of_an_update_are_rejected(memory_grid, toys):
    def tamper(reply):
        reply.content[UPDATE_KEY] = toys.record(toys.arrays())
        return reply

    def without_receipt(reply):
        del reply.content[REPLY_KEY]
        return reply

    assert rejected(memory_grid, toys, tamper).reason == "truncated"
    assert rejected(memory_grid, toys, without_receipt).reason == "mod"


def test_a_diverged_client_refuses_itself_and_the_round_goes_on(memory_grid, toys):
    def edit(partition, tuned, metrics):
        if partition == 1:
            tuned["encoder.weight"][3, 4] = np.nan

    _, outcomes = run(memory_grid(toys.app(edit=edit), 3), toys, 1)
    (rejection,) = outcomes[0].rejections
    assert rejection.reason == "non-finite" and "encoder.weight" in rejection.detail


def test_an_answer_for_another_node_is_rejected(memory_grid, toys):
    def tamper(reply):
        stamp(reply, src_node_id=424242)
        return reply

    def only_first(partition, reply):
        return tamper(reply) if partition == 1 and is_train(reply) else reply

    _, outcomes = run(memory_grid(toys.app(), 3, tamper=only_first), toys, 1, deadline=1.0)
    assert {r.reason for r in outcomes[0].rejections} == {"unknown-node", "late"}
    assert outcomes[0].measurements["clients"] == ["0", "2"]


def test_error_replies_from_the_superlink_count_for_their_node(memory_grid, toys):
    def tamper(reply):
        error = Message(
            Error(code=FailureCode.NODE_GONE, reason="Node unavailable"),
            reply_to=as_instruction(reply),
        )
        stamp(error, src_node_id=1)
        return error

    rejection = rejected(memory_grid, toys, tamper)
    assert rejection.reason == "lost" and "code 5" in rejection.detail


def test_a_node_lost_when_asked_who_it_is_takes_part_once_it_is_back(memory_grid, toys):
    """Killed with its SuperLink and started again, a node counts as online for a while."""
    lost = []

    def tamper(partition, reply):
        if partition != 1 or lost:
            return reply
        lost.append(reply)
        return Message(
            Error(code=FailureCode.NODE_GONE, reason="Node unavailable"),
            reply_to=as_instruction(reply),
        )

    grid = memory_grid(toys.app(), 3, tamper=tamper)
    _, outcomes = run(grid, toys, 1, min_available_nodes=3, node_timeout=30)
    assert outcomes[0].measurements["clients"] == ["0", "1", "2"] and len(lost) == 1


@pytest.mark.parametrize("deaths", [2, 99])
def test_a_worker_that_dies_of_the_question_who_it_is_is_asked_three_times(
    memory_grid, toys, deaths
):
    died = []

    def tamper(partition, reply):
        if partition != 1 or len(died) >= deaths:
            return reply
        died.append(reply)
        error = Error(code=0, reason=f"<class 'RunError'>:<'{WORKER_DIED}'>")
        return Message(error, reply_to=as_instruction(reply))

    grid = memory_grid(toys.app(), 3, tamper=tamper)
    words = {"min_available_nodes": 2 if deaths > 2 else 3, "node_timeout": 30}
    _, outcomes = run(grid, toys, 4, **words)
    assert len(died) == min(deaths, 3)
    last = outcomes[-1].measurements
    assert last["clients"] == (["0", "2"] if deaths > 2 else ["0", "1", "2"])
    assert [WORKER_DIED in one["detail"] for one in last["refused"]] == [True] * (deaths > 2)


def test_hostile_metrics_do_not_end_the_run(memory_grid, toys):
    def edit(partition, tuned, metrics):
        if partition == 1:
            metrics["loss"] = [1.0, float("nan")]
            metrics["\x1b[2J" + "x" * 500] = 1.0

    result, outcomes = run(memory_grid(toys.app(edit=edit), 3), toys, 1)
    assert outcomes[0].measurements["accepted"] == 3
    assert "loss" not in result.train_metrics_clientapp[1]


def inbox_of(memory_grid, toys):
    """The plans and honest replies of one round, for Flower's own loop."""
    grid = memory_grid(toys.app(), 3)
    strategy = DareStrategy(seed=1, fraction_evaluate=0.0)
    messages = list(strategy.configure_train(1, toys.record(toys.arrays()), ConfigRecord(), grid))
    return strategy, list(grid.send_and_receive(messages))


def test_duplicates_same_bytes_count_once_different_bytes_not_at_all(memory_grid, toys):
    strategy, replies = inbox_of(memory_grid, toys)
    strategy.aggregate_train(1, [*replies, replies[0]])
    assert strategy.outcome.measurements["accepted"] == 3
    assert strategy.outcome.measurements["duplicates"] == 1

    strategy, replies = inbox_of(memory_grid, toys)
    other = Message(
        RecordDict(
            {**dict(replies[0].content.items()), "metrics": MetricRecord({"num-examples": 999})}
        ),
        reply_to=as_instruction(replies[0]),
    )
    stamp(other, src_node_id=replies[0].metadata.src_node_id)
    strategy.aggregate_train(1, [*replies, other])
    assert strategy.outcome.measurements["accepted"] == 2
    assert [r.reason for r in strategy.outcome.rejections] == ["duplicate"]
