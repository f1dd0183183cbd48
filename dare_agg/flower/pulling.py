"""Pulling one reply: what is wrong with it is its sender's fault, and nobody else's.

Flower's own ``pull_messages`` takes all parts of a reply, however many and large, makes the
reply of them and raises whatever that raises: any client ends a run with a part of twelve bytes.
Here the parts are asked for one by one within a `ReplyLimit`, and what is wrong with them is an
`UpdateError`. What says that the SuperLink itself is away passes as it was raised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from dare_agg.errors import DareError, UpdateError
from dare_agg.files.json_text import parse_json
from dare_agg.flower.bounded import at_most
from dare_agg.flower.internals import (
    Announced,
    FailureCode,
    ask_for_part,
    ask_for_reply,
    confirm_reply,
    head_of,
    http_client,
    inflate,
)
from dare_agg.flower.limits import MAX_DEPTH, ReplyLimit, need
from dare_agg.rounds.messages import one_line

Found = TypeVar("Found")
# Of an answer that names the parts, for each: its digest in hexadecimal digits.
_NAME_BYTES = 80
# Of an answer around the part it carries.
_FRAME_BYTES = 1024


def plain_pull(grid: Grid) -> Callable[[Iterable[str]], Iterable[Message]]:
    """The grid's own ``pull_messages``, where it is lent too (`dare_agg.flower.receiving`)."""
    pull = grid.pull_messages
    return getattr(pull, "plain", pull)


class Pull:
    """The reply to one message on its way here, in steps that wait for nobody."""

    def __init__(self, grid: Grid, message_id: str, sent: Message, limit: ReplyLimit) -> None:
        self.grid, self.message_id, self.sent, self.limit = grid, message_id, sent, limit
        self._announced: Announced | None = None
        self._missing: list[str] = []
        self._parts = _Parts(limit)

    def step(self) -> Message | None:
        """Go on as far as the SuperLink has it; returns the reply once it is whole.

        Raises `UpdateError` for a reply that is not taken: "oversized" for more than the limit,
        "transport" for what is no reply. What else is raised says that the SuperLink failed.
        """
        client = http_client(self.grid)
        reply = self._in_memory() if client is None else self._from_superlink(client)
        if reply is not None:
            with _senders_fault(Exception):
                self.limit.check(reply)
        return reply

    def _in_memory(self) -> Message | None:
        try:
            return next(iter(plain_pull(self.grid)([self.message_id])), None)
        except (DareError, OSError):
            raise
        except Exception as error:
            raise _no_reply(error) from error

    def _from_superlink(self, client: httpx.Client) -> Message | None:
        if self._announced is None:
            # What announces itself at greater length stays with the SuperLink until the run ends.
            most = self.limit.rest + _NAME_BYTES * self.limit.parts
            found = _asked(client, most, partial(ask_for_reply, self.grid, self.message_id))
            if found is None:
                return None
            self._announced = found
            # The root is asked for first: its sender sends it last.
            self._missing = list(reversed(found.parts))
        message = self._announced.message
        try:
            if not message.has_error() and not self._take_parts(client, self._announced):
                return None
        except _Gone as error:
            confirm_reply(self.grid, message)
            return Message(Error(FailureCode.MESSAGE_GONE, str(error)), reply_to=self.sent)
        except UpdateError:
            confirm_reply(self.grid, message)
            raise
        confirm_reply(self.grid, message)
        with _senders_fault(Exception):
            return message if message.has_error() else self._parts.make(message)

    def _take_parts(self, client: httpx.Client, announced: Announced) -> bool:
        """Take the parts that are there; returns whether these are all."""
        need(announced.count, self.limit.parts, "parts")
        need(announced.depth, MAX_DEPTH, "levels of parts")
        while self._missing:
            digest = self._missing[-1]
            most = self._parts.left + _FRAME_BYTES
            part = _asked(client, most, partial(ask_for_part, self.grid, digest))
            if part is None:
                raise _Gone("the upload ended before all of the reply was there")
            if not part:
                return False
            with _senders_fault(Exception):
                self._parts.add(digest, part)
            self._missing.pop()
        return True


class _Gone(Exception):
    """A part of a reply will not come."""


class _Parts:
    """The parts of one reply that have come, by digest, never more than the limit."""

    def __init__(self, limit: ReplyLimit) -> None:
        self.limit = limit
        self._contents: dict[str, bytes] = {}
        self._chunks: dict[str, int] = {}
        self._arrays: list[tuple[list[str], bytes]] = []
        self._data = self._rest = 0

    @property
    def left(self) -> int:
        """Bytes that may still come."""
        return self.limit.arrays - self._data + self.limit.rest - self._rest

    def add(self, digest: str, part: bytes) -> None:
        """Take one part; `UpdateError` where it is one too much."""
        kind, children, length = head_of(part)
        data = length if kind == "ArrayChunk" else 0
        self._data += data
        self._rest += len(part) - data
        need(self._data, self.limit.arrays, "bytes of arrays")
        need(self._rest, self.limit.rest, "bytes of text, numbers and names")
        self._contents[digest] = part
        if kind == "ArrayChunk":
            self._chunks[digest] = length
        elif kind == "Array":
            self._arrays.append((children, part[len(part) - length :]))

    def make(self, announced: Message) -> Message:
        """The reply that the parts make, from whom the SuperLink says it is."""
        # An array may name one chunk any number of times.
        data = 0
        for children, body in self._arrays:
            indices = parse_json(body)["arraychunk_ids"]
            data += sum(self._chunks[children[index]] for index in indices)
            need(data, self.limit.arrays, "bytes of arrays")
        made = inflate(announced.metadata.message_id, self._contents)
        if not isinstance(made, Message) or not isinstance(made.content, RecordDict):
            raise TypeError(f"a {type(made).__name__} is no message with records")
        announced.content = made.content
        return announced


def _asked(client: httpx.Client, most: int, ask: Callable[[], Found]) -> Found:
    """What the SuperLink answers, in at most so many bytes."""
    # An answer that is no protobuf is a ValueError; that there is none is a kind of httpx's own.
    with at_most(client, most), _senders_fault(ValueError):
        return ask()


@contextmanager
def _senders_fault(kind: type[Exception]) -> Iterator[None]:
    """What is raised within is the fault of who sent the reply."""
    try:
        yield
    except UpdateError:
        raise
    except kind as error:
        raise _no_reply(error) from error


def _no_reply(error: Exception) -> UpdateError:
    said = f"{type(error).__name__}: {one_line(error)}"
    return UpdateError(f"what came is no reply ({said})", reason="transport")
