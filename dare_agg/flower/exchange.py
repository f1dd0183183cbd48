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
    be_patient(grid)
    replace_workers(grid)
    deadline = time.monotonic() + timeout
    sent = _push(grid, messages)
    waiting: queue.SimpleQueue[Pull] = queue.SimpleQueue()
    for message_id, index in sent.items():
        waiting.put(Pull(grid, message_id, messages[index], limit))
    found: queue.Queue[tuple[str, Message] | BaseException] = queue.Queue(maxsize=PULLERS)
    stop = threading.Event()
    pullers = min(PULLERS, len(sent))
    for number in range(pullers):
        threading.Thread(
            target=_pull, args=(waiting, found, stop), name=f"puller-{number}", daemon=True
        ).start()
    missing = set(sent)
    try:
        while missing:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            try:
                item = found.get(timeout=min(left, 0.5))
            except queue.Empty:
                check_engine()
                continue
            if isinstance(item, BaseException):
                raise item
            message_id, reply = item
            if message_id in missing:
                missing.discard(message_id)
                yield sent[message_id], reply
    finally:
        stop.set()


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


def _pull(
    waiting: queue.SimpleQueue[Pull],
    found: queue.Queue[tuple[str, Message] | BaseException],
    stop: threading.Event,
) -> None:
    pause = POLL_SECONDS
    while not stop.is_set():
        try:
            pull = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            reply = pull.step()
        except UpdateError as error:
            reply = unread(error, pull.sent)
        except BaseException as error:
            _hand_over(found, named(error), stop)
            return
        if reply is not None:
            _hand_over(found, (pull.message_id, reply), stop)
            pause = POLL_SECONDS
        else:
            waiting.put(pull)
            stop.wait(pause)
            pause = min(pause * 1.2, POLL_SECONDS_MOST)


def _hand_over(
    found: queue.Queue[tuple[str, Message] | BaseException],
    item: tuple[str, Message] | BaseException,
    stop: threading.Event,
) -> None:
    while not stop.is_set():
        try:
            found.put(item, timeout=0.5)
            return
        except queue.Full:
            continue
