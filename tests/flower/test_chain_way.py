"""An app of arrays on the chain way: version and update are made of a base on disk."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from dare_agg.checkpoint import open_checkpoint, write_checkpoint
from dare_agg.checkpoint.model import model_in
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.base import BASE_VERSION, CHAIN_NAME, DENSE_STEPS, STEPS
from dare_agg.downlink.following import ChainReceiver
from dare_agg.downlink.lossless import encode_counts
from dare_agg.downlink.step_form import StepHead
from dare_agg.downlink.steps import Step, chained_step
from dare_agg.flower.records import DENSE_KEY, DOWN_PREFIX, ORDER_KEY, REPLY_KEY, UPDATE_KEY
from dare_agg.flower.transport import pack, unpack
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.messages import ASK_EVALUATE, ASK_TRAIN, Held, Order, Receipt, Refusal
from dare_agg.rounds.plan import make_plans, plan_from_record
from dare_agg.rounds.server import Accepted, check_reply
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import GlobalModel, ModelRef, global_model

LIMIT = 1 << 20


@pytest.fixture
def base(toys, tmp_path: Path) -> GlobalModel:
    write_checkpoint(tmp_path / "base.safetensors", toys.arrays())
    return model_in(open_checkpoint(tmp_path / "base.safetensors"), exclude=["head"])


@pytest.fixture
def step(base: GlobalModel) -> Step:
    moved = [np.arange(size, dtype=np.int32) * 300 for size in (base.delta.size, base.dense.size)]
    head = StepHead("lossless", "f32", "f32", 1, base.ref.version, "0" * 64, bytes(16))
    return chained_step(head, *map(encode_counts, moved))


@pytest.fixture
def ask(base: GlobalModel, step: Step, toys, tmp_path: Path):
    """Asks the toy app, whose node has the base, for something of the version after ``step``."""

    node = {"partition-id": 1, "base": str(tmp_path / "base.safetensors")}
    context = Context(1, 7, node, RecordDict(), {})

    def ask(what: str, sent: Step | None, version: str = step.head.child, edit=None) -> RecordDict:
        ref = base.ref
        dense = (version, ref.dense_layout, ref.dense_size)
        named = ModelRef(version, ref.layout, ref.size, *dense)
        terms = UpdateTerms(parse_drop_rate("0.5"), exclude=("head",))
        (plan,) = make_plans(b"s" * 32, 2, [None], terms, named)
        order = Order(
            ask=what,
            downlink=CHAIN_NAME,
            version=version,
            arrays_key="arrays",
            exclude=("head",),
            by_form=True,
            facts={BASE_VERSION: base.ref.version},
            plan=plan if what == ASK_TRAIN else None,
        )
        content = {
            ORDER_KEY: ConfigRecord(order.to_record()),
            "config": ConfigRecord({"server-round": 2}),
        }
        if sent is not None:
            content[DOWN_PREFIX + STEPS] = pack(sent.body)
            content[DOWN_PREFIX + DENSE_STEPS] = pack(sent.dense)
        app = toys.app(edit=edit)
        message = Message(RecordDict(content), 1, what)
        reply = app(message, context)
        reply.content["plan"] = ConfigRecord(plan.to_record())
        return reply.content

    return ask


def version_of(base: GlobalModel, step: Step, folder: Path) -> dict[str, np.ndarray]:
    found = ChainReceiver(folder, "other", base, base.ref.version)
    return dict(found.receive(step.head.child, {STEPS: step.body, DENSE_STEPS: step.dense}, None))


def test_the_update_is_that_of_arrays(ask, base, step, toys, tmp_path: Path) -> None:
    answer = ask(ASK_TRAIN, step)
    arrays = version_of(base, step, tmp_path)
    seen = {
        n: a + toys.delta(n, a.shape, 1, 2) if a.dtype.kind == "f" else a + 1
        for n, a in arrays.items()
    }
    plan = plan_from_record(dict(answer["plan"]))
    by_values = replace(plan, model=global_model(arrays, exclude=["head"], by_form=True).ref)
    expected = make_client_update(by_values, arrays, seen, by_form=True)
    found = check_reply(
        plan, unpack(answer[UPDATE_KEY], LIMIT), unpack(answer[DENSE_KEY], LIMIT), 1
    )
    assert isinstance(found, Accepted)
    receipt = Receipt.read(answer[REPLY_KEY])
    assert receipt.have == step.head.child
    assert (receipt.delta_norm, receipt.delta_max) == (expected.delta_norm, expected.delta_max)
    assert "arrays" not in answer and answer["metrics"]["num-examples"] == 20
    # The version is held: nothing needs to come again.
    again = ask(ASK_TRAIN, None)
    assert unpack(again[UPDATE_KEY], LIMIT) == unpack(answer[UPDATE_KEY], LIMIT)


def test_what_an_app_does_not_return_did_not_change(ask, step) -> None:
    def bias_alone(partition, tuned, metrics):
        for name in list(tuned):
            if name != "encoder.bias":
                del tuned[name]

    answer = ask(ASK_TRAIN, step, edit=bias_alone)
    whole = ask(ASK_TRAIN, None)
    assert (
        0 < Receipt.read(answer[REPLY_KEY]).delta_norm < Receipt.read(whole[REPLY_KEY]).delta_norm
    )


def test_an_evaluation_sees_the_version_and_sends_no_model(ask, base, step, tmp_path: Path) -> None:
    answer = ask(ASK_EVALUATE, step)
    arrays = version_of(base, step, tmp_path)
    assert answer["metrics"]["sum"] == pytest.approx(sum(float(a.sum()) for a in arrays.values()))
    assert Held.read(answer[REPLY_KEY]).have == step.head.child
    assert not any(isinstance(record, ArrayRecord) for record in answer.values())


def test_what_does_not_follow_is_asked_for_again(ask, base, step) -> None:
    for sent, version in ((step, "ab" * 32), (None, step.head.child)):
        refusal = Refusal.read(ask(ASK_TRAIN, sent, version)[REPLY_KEY])
        assert refusal is not None and refusal.reason == "base" and refusal.have == base.ref.version
