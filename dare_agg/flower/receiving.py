"""A grid's pushing and pulling, lent to a strategy from the messages it makes to their replies.

Flower's own loop, and any loop that an app writes around a strategy, sends what
``configure_train`` made through the grid and hands what comes back to ``aggregate_train``. What
comes back shall be what FedAvg's code would see, and be taken within the same limits, whoever
wrote the loop. So the grid that ``configure_train`` was given treats those messages as the
strategy's own loop does; all others pass as before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from dare_agg.errors import UpdateError
from dare_agg.flower.exchange import sent_ids
from dare_agg.flower.limits import ReplyLimit
from dare_agg.flower.pulling import Pull, plain_pull
from dare_agg.flower.records import is_order, unread

_PUSH, _PULL = "push_messages", "pull_messages"


class Lent:
    """Between `lend` and `give_back`: pushes ``ready(message)``, and gives ``take(sent, reply)``.

    ``ready`` returns None for messages that are none of ours. ``take`` may return a message to
    send in place of an answer; what comes of that is given then. After ``deadline`` seconds an
    error is given for those who have not answered.
    """

    def __init__(
        self,
        grid: Grid,
        ready: Callable[[Message], Message | None],
        take: Callable[[Message, Message], Message],
        limit: Callable[[], ReplyLimit],
        deadline: float | None = None,
    ) -> None:
        self.grid, self.ready, self.take, self.limit = grid, ready, take, limit
        self.deadline = math.inf if deadline is None else time.monotonic() + deadline
        self._push = grid.push_messages
        self._pulls: dict[str, Pull] = {}
        self._sent: dict[str, Message] = {}

    def push(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the grid's own ``push_messages``."""
        every = [(self.ready(message), message) for message in messages]
        ids = list(self._push([ours or other for ours, other in every]))
        sent = [ours or other for ours, other in every]
        for message_id, index in sent_ids(ids, sent).items():
            if every[index][0] is not None:
                self._sent[message_id] = sent[index]
                self._pulls[message_id] = Pull(self.grid, message_id, sent[index], self.limit())
        return ids

    def pull(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the grid's own ``pull_messages``."""
        ids = list(message_ids)
        others = [message_id for message_id in ids if message_id not in self._pulls]
        found = list(plain_pull(self.grid)(others)) if others else []
        return [*found, *filter(None, map(self._one, (i for i in ids if i in self._pulls)))]

    def _one(self, message_id: str) -> Message | None:
        pull = self._pulls[message_id]
        try:
            reply = pull.step()
        except UpdateError as error:
            reply = unread(error, pull.sent)
        if reply is None and time.monotonic() > self.deadline:
            late = UpdateError("no answer before the round's deadline", reason="late")
            reply = unread(late, pull.sent)
        if reply is None:
            return None
        given = self.take(pull.sent, reply)
        sent = self._sent[message_id]
        if not is_order(given):
            del self._pulls[message_id]
            if pull.sent is sent:
                return given
            content = given.error if given.has_error() else given.content
            return Message(content, reply_to=sent)  # type: ignore[call-overload,no-any-return]
        for again in sent_ids(list(self._push([given])), [given]):
            self._pulls[message_id] = Pull(self.grid, again, given, self.limit())
        return None


def lend(lent: Lent) -> None:
    """Have the grid push and pull through ``lent``, until `give_back`."""

    def pull(message_ids: Iterable[str]) -> Iterable[Message]:
        return lent.pull(message_ids)

    pull.plain = lent.grid.pull_messages  # type: ignore[attr-defined]
    pull.own = vars(lent.grid).get(_PUSH), vars(lent.grid).get(_PULL)  # type: ignore[attr-defined]
    setattr(lent.grid, _PUSH, lent.push)
    setattr(lent.grid, _PULL, pull)


def give_back(grid: Grid) -> None:
    """Leave the grid's methods as they were before they were lent."""
    own: tuple[Any, Any] | None = getattr(vars(grid).get(_PULL), "own", None)
    if own is None:
        return
    for name, method in zip((_PUSH, _PULL), own, strict=True):
        delattr(grid, name)
        if method is not None:
            setattr(grid, name, method)
