"""Sending messages and taking replies as they come, with a deadline that holds.

Flower's own ``send_and_receive`` keeps every reply in memory until the last one is there,
and one pull blocks while a slow client uploads. Here replies are pulled one by one by a few
threads and handed on at once; at the deadline, blocked pulls are left behind. A reply that is
not taken comes as a failure of its sender (`Unread`), and the others go on.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Self

from flwr.app import Message
from flwr.serverapp import Grid

from dare_agg.errors import RunError, UpdateError
from dare_agg.flower.internals import LOST, pushed_id
from dare_agg.flower.limits import ReplyLimit
from dare_agg.flower.patience import be_patient, named
from dare_agg.flower.pulling import Pull
from dare_agg.flower.records import unread
from dare_agg.flower.workers import check_engine, replace_workers

LOG = logging.getLogger("flwr")
PULLERS = 8
POLL_SECONDS = 0.05
POLL_SECONDS_MOST = 1.0
# Of a reply that nothing large was asked of.
ROOM = ReplyLimit()


def online_nodes(grid: Grid) -> list[int]:
    """Node ids that are online now, ascending."""
    be_patient(grid)
    try:
        return sorted(set(grid.get_node_ids()))
    except Exception as error:
        if (told := named(error)) is error:
            raise
        raise told from error


def went_away(reply: Message) -> bool:
    """Whether a reply is Flower's word that the node was lost, not the app's own failure.

    A node that was killed counts as online for up to a minute, may be asked in that time, and
    may be back a moment after Flower noticed.
    """
    return reply.has_error() and reply.error.code in LOST


def exchange(
    grid: Grid, messages: Sequence[Message], timeout: float, limit: ReplyLimit = ROOM
) -> Iterator[tuple[int, Message]]:
    """Send ``messages`` and yield ``(index of the message, reply)`` as replies arrive.

    Ends when every message has its reply, or after ``timeout`` seconds; messages without a
    reply are simply not yielded. A reply over the limit, or that cannot be read, is yielded as
    a failure. Raises `RunError` when the SuperLink takes no message or fails, or a simulation has
    lost what its clients run on.
    """
    if not messages:
        return
    deadline = time.monotonic() + timeout
    places = {id(message): place for place, message in enumerate(messages)}
    with OpenExchange(grid) as opened:
        opened.send(messages, limit)
        while opened.count:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            if (found := opened.next(min(left, 0.5))) is not None:
                yield places[id(found[0])], found[1]


class OpenExchange:
    """Messages that are out and their replies as they come; more may be sent at any time.

    ``count`` is how many have no reply yet. `close`, or the end of a ``with``, leaves them behind.
    """

    def __init__(self, grid: Grid) -> None:
        be_patient(grid)
        self.grid = grid
        self._sent: dict[str, Message] = {}
        self._waiting: queue.SimpleQueue[Pull] = queue.SimpleQueue()
        self._found: queue.Queue[tuple[str, Message] | BaseException] = queue.Queue(PULLERS)
        self._stop = threading.Event()
        self._pullers = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def count(self) -> int:
        """Messages without a reply."""
        return len(self._sent)

    def send(self, messages: Sequence[Message], limit: ReplyLimit = ROOM) -> None:
        """Send messages whose replies may hold so much; raises as `exchange`."""
        replace_workers(self.grid)
        for message_id, index in _push(self.grid, messages).items():
            self._sent[message_id] = messages[index]
            self._waiting.put(Pull(self.grid, message_id, messages[index], limit))
        for number in range(self._pullers, min(PULLERS, self.count)):
            thread = threading.Thread(target=self._pull, name=f"puller-{number}", daemon=True)
            thread.start()
            self._pullers += 1

    def next(self, seconds: float) -> tuple[Message, Message] | None:
        """A message and its reply, once there is one; None after so many seconds."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                item = self._found.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(item, BaseException):
                raise item
            sent = self._sent.pop(item[0], None)
            if sent is not None:
                return sent, item[1]
        check_engine()
        return None

    def forget(self, message: Message) -> None:
        """Wait for the reply to a message no longer."""
        for message_id, sent in list(self._sent.items()):
            if sent is message:
                del self._sent[message_id]

    def close(self) -> None:
        """Leave what has not come."""
        self._stop.set()

    def _pull(self) -> None:
        pause = POLL_SECONDS
        while not self._stop.is_set():
            try:
                pull = self._waiting.get(timeout=0.5)
            except queue.Empty:
                continue
            if pull.message_id not in self._sent:
                continue
            try:
                reply = pull.step()
            except UpdateError as error:
                reply = unread(error, pull.sent)
            except BaseException as error:
                self._hand_over(named(error))
                return
            if reply is not None:
                self._hand_over((pull.message_id, reply))
                pause = POLL_SECONDS
            else:
                self._waiting.put(pull)
                self._stop.wait(pause)
                pause = min(pause * 1.2, POLL_SECONDS_MOST)

    def _hand_over(self, item: tuple[str, Message] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._found.put(item, timeout=0.5)
                return
            except queue.Full:
                continue


def _push(grid: Grid, messages: Sequence[Message]) -> dict[str, int]:
    """Push the messages; returns message id → index."""
    sent = sent_ids(list(grid.push_messages(messages)), messages)
    if not sent:
        raise RunError(
            f"the SuperLink accepted none of {len(messages)} messages; see its log for the reason",
            reason="push",
        )
    return sent


def sent_ids(ids: Sequence[str], messages: Sequence[Message]) -> dict[str, int]:
    """Message id → index of the messages that a grid pushed, of what it returned."""
    sent: dict[str, int] = {}
    if len(ids) == len(messages):
        sent = {message_id: index for index, message_id in enumerate(ids) if message_id}
    else:
        # Flower's in-memory grid leaves refused messages out: match by the id it set.
        accepted = set(ids)
        for index, message in enumerate(messages):
            if pushed_id(message) in accepted:
                sent[pushed_id(message)] = index
    return sent
