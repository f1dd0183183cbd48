"""A model and a Flower app whose every bit is the same on any machine.

What a client learns is whole numbers times a power of two, drawn from SHAKE-256: no library's
random stream and no training stands between two versions of the code. Imports nothing that
the library may move, so the code that made the fixtures runs it too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

SHAPES = {
    "encoder.weight": (20, 24),
    "encoder.bias": (24,),
    "norm.weight": (24,),
    "head.weight": (4, 10),
}


def exact(*words: object, shape: Sequence[int], exponent: int = 23) -> np.ndarray:
    """Float32 values in ±2**(15 - exponent), the same for the same words."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = hashlib.shake_256(repr(words).encode()).digest(2 * count)
    values = np.frombuffer(raw, "<i2").astype(np.float32) * np.float32(2.0**-exponent)
    return values.reshape(tuple(shape))


def start_arrays() -> dict[str, np.ndarray]:
    """The model before the first round; its second tensor is stored in half precision."""
    arrays = {name: exact("start", name, shape=s, exponent=16) for name, s in SHAPES.items()}
    arrays["encoder.bias"] = arrays["encoder.bias"].astype(np.float16)
    arrays["norm.weight"][:3] = -0.0
    arrays["norm.batches"] = np.asarray(0, np.int64)
    return arrays


def record(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def exact_app(mods: list[Any], before: Callable[[Message], None] | None = None) -> ClientApp:
    """An app that "learns" `exact` values; ``before`` sees each order to train."""
    app = ClientApp(mods=mods)

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        if before is not None:
            before(msg)
        partition = int(context.node_config["partition-id"])
        number = int(msg.content["config"]["server-round"])
        tuned = {}
        for name, array in msg.content["arrays"].items():
            start = array.numpy()
            if start.dtype.kind == "f":
                moved = start + exact("learnt", name, partition, number, shape=start.shape)
                tuned[name] = moved.astype(start.dtype)
            else:
                tuned[name] = np.asarray(start + 1)
        metrics = MetricRecord({"num-examples": 8 * (partition + 1), "train-loss": 1.0 / number})
        return Message(RecordDict({"arrays": record(tuned), "metrics": metrics}), reply_to=msg)

    @app.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        metrics = {"num-examples": 4, "accuracy": 0.5 + partition / 8, "loss": 0.25}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)

    return app


def seeded(seed: str) -> Callable[[int], bytes]:
    """Reproducible bytes in place of os.urandom."""
    count = 0

    def random(length: int) -> bytes:
        nonlocal count
        count += 1
        return hashlib.shake_256(f"{seed} {count}".encode()).digest(length)

    return random


def version_round(
    form: str, number: int, sizes: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """A round of the version downlink: the change of both groups, the masks of its updates.

    Later changes of the form auto lie on the masks: the server sends what it still owes there.
    """
    masks = [
        {
            "round": number,
            "mask_key": f"mask key {number:7}".encode(),
            "mask": "bernoulli" if number % 2 else "stratified",
            "rank": rank,
        }
        for rank in range(2)
    ]
    delta, dense = (
        exact(group, number, shape=(size,), exponent=21)
        for group, size in zip(("delta", "dense"), sizes, strict=True)
    )
    if form == "auto" and number > 1:
        delta[:] = 0
    return delta, dense, masks


class Unmoved:
    """A file as the fingerprint cache sees it, in the same place on any machine."""

    def resolve(self) -> Unmoved:
        return self

    def stat(self) -> Any:
        return SimpleNamespace(
            st_dev=1,
            st_ino=2,
            st_size=3,
            st_mtime=4.0,
            st_ctime=5.0,
            st_mtime_ns=4_000_000_000,
            st_ctime_ns=5_000_000_000,
        )

    def __str__(self) -> str:
        return "/models/base.safetensors"


# Runs that were cut off after their third round of five, by the folder that holds their state.
ROUNDS, CUT_OFF = 5, 3
STRATEGIES: dict[str, dict[str, Any]] = {
    # No seed: the secret that keys the masks was drawn, and is in the state alone.
    "momentum-steps": {
        "seed": None,
        "downlink": "auto",
        "server_step": "momentum",
        "drop_rate": "0.75",
        "dense": ["^head"],
    },
    "adam-full": {
        "seed": 3,
        "downlink": "full",
        "server_step": "adam",
        "method": "ties",
        "drop_rate": "0.5",
        "values": "b2",
        "mask": "bernoulli",
        "dense": ["^head"],
    },
    "plain-i8": {
        "seed": 5,
        "downlink": "dense-i8",
        "server_step": "plain",
        "method": "average",
        "drop_rate": "0.9",
        "values": "i8",
        "exclude": ["^norm"],
    },
}
SAMPLING = {
    "min_available_nodes": 3,
    "min_train_nodes": 2,
    "fraction_train": 0.7,
    "fraction_evaluate": 0.0,
}

SECURE_RUN = {
    "stage_seconds": 20,
    "fraction_evaluate": 0.0,
    "seed": 3,
    "run": "secure",
    "dense": ["^head"],
    "server_step": "momentum",
}
SECURE_SUM = {"method": "mean", "drop_rate": "0.5", "clip": 0.05}

# A run of the server app, killed while the second method's third round was trained.
RUN_CLIENTS = 3


def run_node(partition: int) -> dict[str, Any]:
    return {"partition-id": partition, "num-partitions": RUN_CLIENTS, "cache": "cache"}


RUN_CONFIG = {
    "num-rounds": 4,
    "methods": "fedavg,dare-ties",
    "drop-rate": "0.5",
    "server-step": "adam",
    "downlink": "auto",
    "min-clients": RUN_CLIENTS,
    "labels": "ham,spam",
    "initial": "start.safetensors",
    "model": "base",
    "data": "letters",
    "output": "run",
}
