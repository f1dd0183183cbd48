"""What apps return beside the plain case: parts, wrapped models, the model after an evaluation."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from dare_agg.errors import RunError
from dare_agg.flower import DareStrategy, dare_mod
from dare_agg.flower.transport import message_bytes

EXACT = {"drop_rate": 0, "values": "f32", "dense_values": "f32"}


def answer(msg, arrays, key="arrays", **metrics):
    content = {"metrics": MetricRecord({"num-examples": 10, **metrics})}
    return Message(RecordDict({key: arrays, **content} if arrays else content), reply_to=msg)


def plus_one(arrays):
    """The floating tensors plus one."""
    return ArrayRecord({n: Array(np.asarray(a.numpy() + 1)) for n, a in arrays.items()})


def app_of(train, evaluate=None, mods=(dare_mod,)):
    app = ClientApp(mods=list(mods))
    app.train()(train)
    app.evaluate()(evaluate or (lambda msg, ctxt: answer(msg, None)))
    return app


def start(grid, arrays, strategy=DareStrategy, **words):
    if strategy is DareStrategy:
        words = {"seed": 3, "node_timeout": 2.0, **EXACT, **words}
    return strategy(**words).start(grid, arrays, num_rounds=2, timeout=20)


def weights(rows=10):
    values = np.linspace(-1, 1, rows * 20).astype(np.float32).reshape(rows, 20)
    return ArrayRecord({"w": Array(values), "b": Array(np.ones(rows, np.float32))})


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 2))


# --- evaluation ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model", "weights"])
def test_an_evaluation_sends_its_metrics_and_not_the_model(memory_grid, key):
    def evaluate(msg, ctxt):
        reply = answer(msg, msg.content["model"], key, loss=0.25)
        reply.content["scores"] = ArrayRecord({"per-class": Array(np.arange(3.0))})
        reply.content["info"] = ConfigRecord({"device": "cpu"})
        return reply

    # Two megabytes: more than a reply to an evaluation may hold.
    train = app_of(lambda msg, ctxt: answer(msg, plus_one(msg.content["model"]), "model"), evaluate)
    grid = memory_grid(train, 2)
    result = start(grid, weights(30_000), arrayrecord_key="model", reply_room=100_000)
    assert [dict(m) for m in result.evaluate_metrics_clientapp.values()] == [{"loss": 0.25}] * 2
    replies = [m for m in grid.received if m.metadata.message_type == "evaluate"]
    assert replies and all(message_bytes(m.content) < 2000 for m in replies)
    assert all({"metrics", "scores", "info"} <= set(m.content) for m in replies)


# --- a part of the tensors -----------------------------------------------------------------


@pytest.mark.parametrize("words", [EXACT, {"drop_rate": 0.9, "values": "b1"}])
def test_tensors_that_training_leaves_out_count_as_unchanged(memory_grid, words):
    def train(msg, ctxt):
        return answer(msg, ArrayRecord({"b": plus_one(msg.content["arrays"])["b"]}))

    first = weights()
    result = start(memory_grid(app_of(train), 3), first, **words)
    assert result.arrays["w"].data == first["w"].data
    moved = result.arrays["b"].numpy() - first["b"].numpy()
    assert np.allclose(moved, 2) if words is EXACT else moved.any()


def test_a_client_that_trains_other_tensors_moves_them_by_its_share(memory_grid):
    def train(msg, ctxt):
        name = "w" if ctxt.node_config["partition-id"] == 0 else "b"
        return answer(msg, ArrayRecord({name: plus_one(msg.content["arrays"])[name]}))

    first = weights()
    result = start(memory_grid(app_of(train), 2), first)
    for name in ("w", "b"):
        assert np.allclose(result.arrays[name].numpy(), first[name].numpy() + 1)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda arrays: ArrayRecord(), "without arrays"),
        (lambda arrays: ArrayRecord({**arrays, "lora": arrays["b"]}), "does not have .'lora'"),
    ],
)
def test_what_is_no_part_of_the_model_is_said(memory_grid, returned, words):
    def train(msg, ctxt):
        reply = answer(msg, None)
        reply.content["arrays"] = returned(msg.content["arrays"])
        return reply

    with pytest.raises(RunError, match=words):
        start(memory_grid(app_of(train), 2), weights())


def test_a_part_of_a_list_is_refused(memory_grid):
    def train(msg, ctxt):
        return answer(msg, ArrayRecord(msg.content["arrays"].to_numpy_ndarrays()[:1]))

    arrays = ArrayRecord([np.ones((3, 4), np.float32), np.ones((4, 4), np.float32)])
    with pytest.raises(RunError, match="1 arrays of a list of 2"):
        start(memory_grid(app_of(train), 2), arrays)


def test_a_local_tensor_that_a_round_leaves_out_stays_as_it_was(memory_grid):
    def train(msg, ctxt):
        whole, number = plus_one(msg.content["arrays"]), msg.content["config"]["server-round"]
        return answer(msg, whole if number == 1 else ArrayRecord({"w": whole["w"]}))

    grid = memory_grid(app_of(train), 2)
    start(grid, weights(), exclude=["^b$"])
    for context in grid.contexts.values():
        assert (context.state["dare.local"]["b"].numpy() == 2).all()


# --- wrapped models ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        nn.DataParallel,
        lambda net: torch.compile(net),
        lambda net: nn.DataParallel(torch.compile(net)),
    ],
    ids=["DataParallel", "compile", "both"],
)
def test_a_wrapped_model_gives_what_fedavg_gives_without_the_wrapper(memory_grid, wrapped, caplog):
    def trained(msg, wrap):
        model = net()
        model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        whole = wrap(model)
        with torch.no_grad():
            for parameter in whole.parameters():
                parameter += 0.25
        return answer(msg, ArrayRecord(whole.state_dict()))

    caplog.set_level(logging.CRITICAL, "flwr")
    first = ArrayRecord(net().state_dict())
    grid = memory_grid(app_of(lambda msg, ctxt: trained(msg, wrapped)), 2)
    found = start(grid, first).arrays
    plain = app_of(lambda msg, ctxt: trained(msg, lambda model: model), mods=())
    expected = start(memory_grid(plain, 2), first, strategy=FedAvg).arrays
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name].numpy(), array.numpy(), rtol=1e-6)
