"""An in-memory grid that calls real ClientApps, so Flower tests need no processes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from dare_agg.flower import dare_mod

Tamper = Callable[[int, Message], Message | None]


def over_the_wire(message: Message) -> Message:
    """Serialise and read back, as Flower's transport does."""
    objects = get_all_nested_objects(message)
    contents = {object_id: item.deflate() for object_id, item in objects.items()}
    received = inflate_object_from_contents(message.object_id, contents)
    received.metadata.__dict__["_message_id"] = message.metadata.message_id
    return received


class MemoryGrid(Grid):
    """Runs ``app`` for each of ``clients`` nodes when their replies are pulled.

    ``tamper(partition, reply)`` may change a reply, or return None for a node that never
    answers. ``shuffle`` seeds the order in which replies become ready. Node ids differ from
    grid to grid, as Flower's do.
    """

    def __init__(
        self,
        app: ClientApp,
        clients: int,
        *,
        tamper: Tamper | None = None,
        shuffle: int = 0,
        node_config: Callable[[int], dict] | None = None,
        run_config: dict | None = None,
    ) -> None:
        self.app = app
        self.tamper = tamper
        self.random = random.Random(shuffle)
        ids = [random.getrandbits(62) + 2 for _ in range(clients)]
        self.partitions = {node: partition for partition, node in enumerate(ids)}
        self.contexts = {
            node: Context(
                run_id=1,
                node_id=node,
                node_config=(
                    node_config(partition)
                    if node_config
                    else {"partition-id": partition, "num-partitions": clients}
                ),
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for node, partition in self.partitions.items()
        }
        self.offline: set[int] = set()
        self.sent: list[Message] = []
        self.received: list[Message] = []
        self._waiting: dict[str, Message] = {}
        self._holds: dict[str, int] = {}
        self._count = 0
        self._lock = threading.Lock()

    def set_run(self, run):  # pragma: no cover - part of Flower's interface
        raise NotImplementedError

    @property
    def run(self):  # pragma: no cover - part of Flower's interface
        raise NotImplementedError

    def create_message(self, *args, **kwargs):  # pragma: no cover - deprecated in Flower
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        ids = [node for node in self.partitions if node not in self.offline]
        self.random.shuffle(ids)
        return ids

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            with self._lock:
                self._count += 1
                message_id = f"message-{self._count}"
                message.metadata.__dict__["_message_id"] = message_id
                self._waiting[message_id] = over_the_wire(message)
                self._holds[message_id] = self.random.randrange(4)
            self.sent.append(message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for message_id in message_ids:
            with self._lock:
                if self._holds.get(message_id, 0) > 0:
                    self._holds[message_id] -= 1
                    continue
                message = self._waiting.pop(message_id, None)
                if message is None:
                    continue
                reply = self._answer(message)
            if reply is not None:
                self.received.append(reply)
                replies.append(reply)
        return replies

    def _answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        try:
            reply = self.app(message, self.contexts[node])
        except Exception as error:
            # Flower sends the text of the exception with code 2.
            reply = Message(Error(code=2, reason=f"{type(error)}:<'{error}'>"), reply_to=message)
        if self.tamper is not None:
            changed = self.tamper(self.partitions[node], reply)
            if changed is None:
                return None
            reply = changed
        return over_the_wire(reply)

    def send_and_receive(self, messages, *, timeout=None) -> list[Message]:
        pending = self.push_messages(messages)
        replies = []
        while pending:
            for message_id in list(pending):
                got = self.pull_messages([message_id])
                if got or message_id not in self._waiting:
                    pending.remove(message_id)
                    replies.extend(got)
        return replies


@pytest.fixture(autouse=True)
def task_identity():
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = 1
    TaskIdentity.node_id = 1


@pytest.fixture
def memory_grid():
    return MemoryGrid


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


@pytest.fixture
def toys():
    """The toy model and app as one object."""

    class Toys:
        arrays = staticmethod(toy_arrays)
        app = staticmethod(toy_app)
        delta = staticmethod(toy_delta)

        @staticmethod
        def record(arrays: dict[str, np.ndarray]) -> ArrayRecord:
            return ArrayRecord({name: Array(array) for name, array in arrays.items()})

    return Toys
