"""A client damages the records of its reply: a rejection with a reason, or an update as planned."""

import random
from dataclasses import replace
from time import process_time

import numpy as np
import pytest
from damaged import damaged_content
from flwr.app import ConfigRecord, Message, RecordDict
from toy import toy_app, toy_arrays

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import REASONS, UpdateError
from dare_agg.flower.replies import TrainReply, judge, metrics_and_weight
from dare_agg.flower.transport import to_record
from dare_agg.rounds.messages import Order, one_line
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.server import Rejection, check_weight
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model
from simulations.runs.memory_grid import MemoryGrid

COUNT = 1500


def weighed(judged):
    """The judged reply with what it says it weighs, as a round reads it."""
    if isinstance(judged, Rejection):
        return judged
    accepted = judged.accepted
    try:
        _, weight = metrics_and_weight(judged.content, "num-examples", "examples")
        checked = check_weight(weight, accepted.plan.terms.max_weight)
    except UpdateError as error:
        return Rejection(accepted.plan.client, error.reason, one_line(error))
    return replace(judged, accepted=replace(accepted, weight=checked))


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
        "dare.order": ConfigRecord(order.to_record()), "arrays": to_record(toy_arrays()),
        "config": ConfigRecord({"lr": 0.1, "server-round": 1}),
    })  # fmt: skip
    grid = MemoryGrid(toy_app(), 1)
    (node,) = grid.get_node_ids()
    (good,) = grid.send_and_receive([Message(content, node, "train")])
    assert isinstance(judge(plan, node, good), TrainReply)
    rng, reasons = random.Random(3), set()
    for _ in range(COUNT):
        asked = Message(content, node, "train")
        reply = Message(damaged_content(rng, good.content), reply_to=asked)
        began = process_time()
        judged = weighed(judge(plan, node, reply))
        assert process_time() - began < 1
        if isinstance(judged, Rejection):
            assert judged.reason in REASONS and judged.detail.isprintable()
            reasons.add(judged.reason)
        else:
            out = np.empty(model.delta.size, np.float32)
            judged.accepted.update.read(0, out.size, out)
            assert np.isfinite(out).all() and np.isfinite(judged.accepted.weight)
    assert {"mod", "checksum", "weight", "truncated", "transport"} <= reasons
