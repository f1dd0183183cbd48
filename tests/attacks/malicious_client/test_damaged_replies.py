"""A client damages the records of its reply: a rejection with a reason, or an update as planned."""

import random
from time import process_time

import numpy as np
import pytest
from damaged import damaged_content
from flwr.app import ConfigRecord, Message, RecordDict
from toy import toy_app, toy_arrays

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import REASONS
from dare_agg.flower.records import Order
from dare_agg.flower.replies import TrainReply, judge
from dare_agg.flower.transport import to_record
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.server import Rejection
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model
from simulations.runs.memory_grid import MemoryGrid

COUNT = 1500


@pytest.mark.parametrize("dense", [(), ("head",)])
def test_damaged_records_of_a_reply(dense):
    model = global_model(toy_arrays(), dense=dense)
    terms = UpdateTerms(parse_drop_rate("0.5"), dense=dense)
    plan = make_plans(b"s" * 32, 1, [None], terms, model.ref)[0]
    order = Order(
        ask="train", downlink="full", version=model.ref.version, arrays_key="arrays", dense=dense,
        plan=plan,
    )  # fmt: skip
    content = RecordDict({
        "dare.order": order.to_record(), "arrays": to_record(toy_arrays()),
        "config": ConfigRecord({"lr": 0.1, "server-round": 1}),
    })  # fmt: skip
    grid = MemoryGrid(toy_app(), 1)
    (node,) = grid.get_node_ids()
    (good,) = grid.send_and_receive([Message(content, node, "train")])
    assert isinstance(judge(plan, node, good, "num-examples", "examples"), TrainReply)
    rng, reasons = random.Random(3), set()
    for _ in range(COUNT):
        asked = Message(content, node, "train")
        reply = Message(damaged_content(rng, good.content), reply_to=asked)
        began = process_time()
        judged = judge(plan, node, reply, "num-examples", "examples")
        assert process_time() - began < 1
        if isinstance(judged, Rejection):
            assert judged.reason in REASONS and judged.detail.isprintable()
            reasons.add(judged.reason)
        else:
            out = np.empty(model.delta.size, np.float32)
            judged.accepted.update.read(0, out.size, out)
            assert np.isfinite(out).all() and np.isfinite(judged.accepted.weight)
    assert {"mod", "checksum", "weight", "truncated", "transport"} <= reasons
