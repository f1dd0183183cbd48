"""A toy model and an app that trains it by adding numbers known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dare_agg.flower import dare_mod
from dare_agg.secure.roster import Roster, read_roster


def numpy_of(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}


def record_of(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def roster_of(folder: Path) -> Roster:
    """The roster that the fixture ``keys`` wrote."""
    return read_roster(folder / "roster.json")


def toy_arrays(seed: int = 0, head: bool = True) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    arrays = {
        "encoder.weight": generator.normal(size=(40, 25)).astype(np.float32),
        "encoder.bias": generator.normal(size=25).astype(np.float32),
        "norm.running_mean": np.zeros(25, np.float32),
        "norm.running_var": np.ones(25, np.float32),
        "norm.num_batches_tracked": np.asarray(0, np.int64),
    }
    if head:
        arrays["head.weight"] = generator.normal(size=(25, 3)).astype(np.float32)
    return arrays


def toy_delta(name: str, shape: tuple[int, ...], partition: int, server_round: int) -> np.ndarray:
    """What client ``partition`` learns in a round: small, deterministic, its own."""
    key = [partition, server_round, *name.encode()]
    return np.random.default_rng(key).normal(0.002, 0.004, size=shape).astype(np.float32)


def toy_app(mods: list | None = None, edit: Callable | None = None) -> ClientApp:
    """An app that "trains" by adding `toy_delta`; ``edit(partition, arrays, metrics)``."""
    app = ClientApp(mods=[dare_mod] if mods is None else mods)

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        server_round = int(msg.content["config"]["server-round"])
        arrays = {name: array.numpy() for name, array in msg.content["arrays"].items()}
        tuned = {}
        for name, array in arrays.items():
            if array.dtype.kind == "f":
                array = array + toy_delta(name, array.shape, partition, server_round)
            else:
                array = array + 1
            tuned[name] = np.asarray(array)  # sums of 0-d arrays are scalars
        metrics = {"num-examples": 10 * (partition + 1), "loss": 1.0 / (partition + 1)}
        if edit is not None:
            edit(partition, tuned, metrics)
        content = RecordDict(
            {
                "arrays": ArrayRecord({name: Array(array) for name, array in tuned.items()}),
                "metrics": MetricRecord(metrics),
            }
        )
        return Message(content, reply_to=msg)

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        total = sum(float(array.numpy().sum()) for array in msg.content["arrays"].values())
        metrics = MetricRecord({"num-examples": 5, "sum": total})
        return Message(RecordDict({"metrics": metrics}), reply_to=msg)

    return app
