"""`dare_mod` among other people's mods: wherever it stands, or in words where it must stand."""

from __future__ import annotations

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, arrays_size_mod, fixedclipping_mod, message_size_mod

from dare_agg.errors import RunError
from dare_agg.flower import DareStrategy, dare_mod


def reads_what_apps_read(msg, ctxt, call_next):
    """A mod that leans on what every message of FedAvg has."""
    assert msg.content["cfg"]["server-round"] >= 1 and msg.content["cfg"]["lr"] == 0.5
    sum(array.numpy().size for array in msg.content["model"].values())
    reply = call_next(msg, ctxt)
    dict(reply.content["metrics"])
    return reply


def reads_trained_loss(msg, ctxt, call_next):
    reply = call_next(msg, ctxt)
    assert reply.content["metrics"]["loss"]
    return reply


def train(msg, ctxt):
    tuned = {name: array.numpy() for name, array in msg.content["model"].items()}
    tuned["encoder.bias"] = tuned["encoder.bias"] + 1.0
    arrays = ArrayRecord({name: Array(array) for name, array in tuned.items()})
    metrics = MetricRecord({"num-examples": 10, "loss": 0.5})
    return Message(RecordDict({"model": arrays, "metrics": metrics}), reply_to=msg)


def evaluate(msg, ctxt):
    metrics = MetricRecord({"num-examples": 1, "tensors": len(msg.content["model"])})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)


def app_with(mods, train_mods=()):
    """An app under other record keys than Flower's own."""
    app = ClientApp(mods=mods)
    app.train(mods=list(train_mods))(train)
    app.evaluate()(evaluate)
    return app


def start(grid, toys, **words):
    words = {"seed": 7, "node_timeout": 2.0, **words}
    strategy = DareStrategy(arrayrecord_key="model", configrecord_key="cfg", **words)
    return strategy.start(
        grid,
        toys.record(toys.arrays()),
        num_rounds=1,
        timeout=20,
        train_config=ConfigRecord({"lr": 0.5}),
        evaluate_config=ConfigRecord({"lr": 0.5}),
    )


WATCHING = [message_size_mod, arrays_size_mod, reads_what_apps_read]


@pytest.mark.parametrize(
    "mods",
    [
        [*WATCHING, dare_mod],
        [dare_mod, *WATCHING, reads_what_apps_read],
        [message_size_mod, dare_mod, arrays_size_mod],
        [dare_mod, dare_mod],
        [dare_mod, reads_what_apps_read],
    ],
    ids=["before it", "behind it", "around it", "twice", "behind it, the trained loss"],
)
def test_mods_that_watch_may_stand_anywhere(memory_grid, toys, mods):
    expected = start(memory_grid(app_with([dare_mod]), 3), toys)
    found = start(memory_grid(app_with(mods), 3), toys)
    for name, array in expected.arrays.items():
        assert found.arrays[name].data == array.data
    assert found.evaluate_metrics_clientapp[1] == expected.evaluate_metrics_clientapp[1]


@pytest.mark.parametrize(
    "mod", [LocalDpMod(1.0, 1.0, 1.0, 1e-5), fixedclipping_mod, reads_trained_loss]
)
def test_a_mod_that_needs_the_trained_arrays_is_told_its_place(memory_grid, toys, mod):
    with pytest.raises(RunError, match=r"list dare_mod first, ClientApp\(mods=\[dare_mod") as told:
        start(memory_grid(app_with([mod, dare_mod]), 2), toys)
    name = getattr(mod, "__name__", type(mod).__name__)
    assert (name if name != "reads_trained_loss" else "'loss'") in str(told.value)


def test_the_mod_may_stand_on_the_training_function(memory_grid, toys):
    result = start(memory_grid(app_with([message_size_mod], [dare_mod]), 3), toys)
    assert result.evaluate_metrics_clientapp[1]["tensors"] == len(toys.arrays())


def test_a_forgotten_mod_is_named_before_anything_trains(memory_grid, toys):
    with pytest.raises(RunError, match="lacks dare_mod"):
        start(memory_grid(app_with([]), 2), toys)
