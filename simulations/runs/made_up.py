"""Clients that are made up: an update of a delta that exists tile by tile only."""

from __future__ import annotations

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from dare_agg.codec.update import encode_update
from dare_agg.flower.records import ORDER_KEY, REPLY_KEY, UPDATE_KEY
from dare_agg.flower.transport import pack
from dare_agg.rounds.messages import Hello, Order, Receipt


class Ripple:
    """A delta of 2e-4 and -1e-4 in turns, made where it is read."""

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, lo: int, hi: int, out: np.ndarray) -> None:
        out[:] = np.float32(2e-4)
        out[(lo & 1) :: 2] = np.float32(-1e-4)

    def take(self, positions: np.ndarray) -> np.ndarray:
        return np.where(positions & 1, np.float32(2e-4), np.float32(-1e-4))


def made_up_answer(message: Message, number: int) -> Message:
    """What client ``number`` answers: it holds the version, and its update is of a `Ripple`."""
    order = Order.read(message.content.config_records[ORDER_KEY])
    if order.plan is None:
        hello = Hello(name=str(number), have=order.version)
        return Message(RecordDict({REPLY_KEY: ConfigRecord(hello.to_record())}), reply_to=message)
    spec = order.plan.spec()
    content = RecordDict(
        {
            UPDATE_KEY: pack(encode_update(spec, Ripple(spec.size))),
            REPLY_KEY: ConfigRecord(Receipt.of(order.plan, have=order.version).to_record()),
            "metrics": MetricRecord({"num-examples": 1 + number}),
        }
    )
    return Message(content, reply_to=message)
