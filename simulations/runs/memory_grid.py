"""A Flower grid in memory that calls real ClientApps: a federation without processes.

Messages are serialised and read back as Flower's transport does it. Tests, references of
deterministic runs and the benchmark of the server's memory use it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from dare_agg.flower.internals import failure, set_task

Tamper = Callable[[int, Message], Message | None]


def pretend_task() -> None:
    """Set what Flower's message code wants to know of the process it runs in."""
    set_task(1, 1, 1)


def stamp(message: Message, **fields: str | int) -> None:
    """Set what only Flower's own processes set of a message: message_id, src_node_id, run_id."""
    for name, value in fields.items():
        if not hasattr(message.metadata, name):
            raise AttributeError(f"Flower's metadata has no {name}")
        message.metadata.__dict__[f"_{name}"] = value


def over_the_wire(message: Message) -> Message:
    """Serialise and read back, as Flower's transport does."""
    with no_object_id_recompute():
        objects = get_all_nested_objects(message)
        contents = {object_id: item.deflate() for object_id, item in objects.items()}
        received = inflate_object_from_contents(message.object_id, contents)
    stamp(received, message_id=message.metadata.message_id)
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
                stamp(message, message_id=message_id)
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
            reply = failure(error, message)
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


class WaitingGrid(MemoryGrid):
    """Messages wait as they are until their replies are pulled, sharing their payloads.

    As in a SuperLink, which takes them over: for measuring what a server itself holds.
    """

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            self._count += 1
            ids.append(f"message-{self._count}")
            stamp(message, message_id=ids[-1])
            self._waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = super().pull_messages(message_ids)
        self.received.clear()
        return replies
