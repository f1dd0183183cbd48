"""Runs of the strategy on toy apps, and ways to tamper with what clients answer."""

from __future__ import annotations

from flwr.app import Error, Message, RecordDict
from toy import numpy_of

from dare_agg.flower import DareStrategy
from dare_agg.flower.internals import FailureCode
from dare_agg.flower.records import UPDATE_KEY
from simulations.runs.memory_grid import stamp

DENSE = {"drop_rate": 0, "values": "f32", "dense_values": "f32", "dense": ["head"]}


def run(grid, toys, rounds=2, arrays=None, evaluate_fn=None, start=None, **words):
    outcomes = []
    words = {"seed": 7, "fraction_evaluate": 0.0, "min_evaluate_nodes": 0, **words}
    hook = words.pop("round_hook", None)

    def remember(outcome):
        outcomes.append(outcome)
        return hook(outcome) if hook else None

    strategy = DareStrategy(round_hook=remember, **words)
    record = toys.record(toys.arrays() if arrays is None else arrays)
    result = strategy.start(
        grid, record, num_rounds=rounds, timeout=30, evaluate_fn=evaluate_fn, **(start or {})
    )
    return result, outcomes


def is_train(reply: Message) -> bool:
    return reply.has_error() or UPDATE_KEY in reply.content


def rejected(memory_grid, toys, tamper, **words):
    """Run one round of three in which client 1's reply is tampered with."""

    def only_first(partition, reply):
        if partition != 1 or not is_train(reply):
            return reply
        return tamper(reply)

    _, outcomes = run(memory_grid(toys.app(), 3, tamper=only_first), toys, 1, **words)
    assert outcomes[0].measurements["clients"] == ["0", "2"]
    (rejection,) = [r for r in outcomes[0].rejections if r.client == 1]
    return rejection


def edit_record(key, **changes):
    def tamper(reply):
        reply.content[key].update(changes)
        return reply

    return tamper


def gone(reply: Message) -> Message:
    """What Flower answers in place of a reply when its node is lost."""
    error = Error(code=FailureCode.NODE_GONE, reason="Node unavailable")
    return Message(error, reply_to=as_instruction(reply))


def as_instruction(reply: Message) -> Message:
    instruction = Message(
        RecordDict(), dst_node_id=reply.metadata.src_node_id, message_type="train"
    )
    stamp(instruction, message_id=reply.metadata.reply_to_message_id)
    return instruction


def arrays_after(strategy, grid, toys, rounds=2):
    """The global arrays that a strategy ends with."""
    return numpy_of(strategy.start(grid, toys.record(toys.arrays()), num_rounds=rounds).arrays)
