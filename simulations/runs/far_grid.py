"""A Flower grid whose clients live in another process, so that each side's memory is its own.

The server's process makes a `FarGrid` and the other one calls `serve`; messages go through the
standard input and output of the latter, serialised as Flower's transport does it.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from simulations.runs.memory import Peak, memory_of
from simulations.runs.memory_grid import WaitingGrid, pretend_task, stamp

_LENGTH = struct.Struct("<Q")


class FarGrid(WaitingGrid):
    """``clients`` nodes in the process that ``command`` starts; use it as a context.

    A message waits here until its reply is pulled, sharing its payload with the others, as it
    would in a SuperLink. ``answers`` says of each reply whether it was trained and what CPU it
    took beside training, ``peak`` what the clients' process took of memory, ``before`` what it had
    when it was ready. What the first client was asked is written to the file ``kept``, from which
    another process that calls `serve` can read it (`answer_kept`).
    """

    def __init__(self, command: Sequence[str], clients: int, kept: Path | None = None) -> None:
        super().__init__(ClientApp(), clients)
        self._kept = kept
        self.answers: list[dict[str, Any]] = []
        self.began: float | None = None
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._peak = Peak(self._child.pid)

    def __enter__(self) -> FarGrid:
        assert self._child.stdout is not None
        self.before: dict[str, Any] = _read(self._child.stdout)[0]
        self._peak.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()
        self._peak.__exit__(None, None, None)

    @property
    def peak(self) -> Peak:
        return self._peak

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        if self.began is None:
            self.began = time.process_time()
        return super().push_messages(messages)

    def _answer(self, message: Message) -> Message:
        assert self._child.stdin is not None and self._child.stdout is not None
        node = message.metadata.dst_node_id
        head = {"partition": self.partitions[node], "node": node}
        _write(self._child.stdin, head, message)
        if self._kept is not None and head["partition"] == 0:
            with self._kept.open("ab") as file:
                _write(file, head, message)
        said, reply = _read(self._child.stdout)
        self.answers.append(said)
        assert reply is not None
        return reply


def answer_kept(command: Sequence[str], kept: Path) -> tuple[list[dict[str, Any]], int, Peak]:
    """Have a clients' process answer the messages that a `FarGrid` kept.

    Returns what it says of its answers, its memory when it was ready, and its peaks.
    """
    with kept.open("rb") as asked:
        child = subprocess.Popen(command, stdin=asked, stdout=subprocess.PIPE)
    assert child.stdout is not None
    answers: list[dict[str, Any]] = []
    before = int(_read(child.stdout)[0]["own_bytes"])
    with Peak(child.pid) as peak:
        while True:
            try:
                answers.append(_read(child.stdout)[0])
            except EOFError:
                break
        child.wait()
    return answers, before, peak


class Clients(Protocol):
    """What answers the messages; ``trained_seconds`` says how much of its CPU was training."""

    trained_seconds: float

    def __call__(self, message: Message, context: Context) -> Message: ...


def serve(app: Clients, context_of: Callable[[int], dict]) -> None:
    """Answer the messages of a `FarGrid` until it ends; ``context_of`` gives a node's config."""
    pretend_task()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    contexts: dict[int, Context] = {}
    _write(sink, {"own_bytes": memory_of()[0]})
    while True:
        try:
            head, message = _read(source)
        except EOFError:
            return
        assert message is not None
        node = int(head["node"])
        if node not in contexts:
            config = context_of(int(head["partition"]))
            contexts[node] = Context(1, node, config, RecordDict(), {})
        began, app.trained_seconds = time.process_time(), 0.0
        reply = app(message, contexts[node])
        took = time.process_time() - began - app.trained_seconds
        trained = app.trained_seconds > 0
        _write(sink, {**head, "trained": trained, "cpu_seconds": took}, reply)


def _write(stream: IO[bytes], head: dict[str, Any], message: Message | None = None) -> None:
    contents: dict[str, bytes] = {}
    if message is not None:
        with no_object_id_recompute():
            objects = get_all_nested_objects(message)
            contents = {name: item.deflate() for name, item in objects.items()}
            head = {**head, "object": message.object_id, "id": message.metadata.message_id}
    head["sizes"] = {name: len(content) for name, content in contents.items()}
    text = json.dumps(head).encode()
    stream.write(_LENGTH.pack(len(text)) + text)
    for content in contents.values():
        stream.write(content)
    stream.flush()


def _read(stream: IO[bytes]) -> tuple[dict[str, Any], Message | None]:
    head = json.loads(_exactly(stream, _LENGTH.unpack(_exactly(stream, _LENGTH.size))[0]))
    contents = {name: _exactly(stream, size) for name, size in head["sizes"].items()}
    if not contents:
        return head, None
    message = inflate_object_from_contents(head["object"], contents)
    assert isinstance(message, Message)
    stamp(message, message_id=head["id"])
    return head, message


def _exactly(stream: IO[bytes], count: int) -> bytes:
    found = stream.read(count)
    if len(found) != count:
        raise EOFError("the other process has ended")
    return found
