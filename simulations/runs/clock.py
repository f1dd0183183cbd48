"""A virtual clock: what happens when, in one order, without waiting."""

from __future__ import annotations

import heapq
import math
from typing import Generic, TypeVar

from dare_agg.errors import ConfigError

Event = TypeVar("Event")


class Clock(Generic[Event]):
    """Events in the order of their times; of two at one time the one that was set first.

    ``now`` is the time in seconds of the event that came last.

    >>> clock = Clock()
    >>> clock.after(5, "late"), clock.after(1, "soon"), clock.after(5, "late too")
    (None, None, None)
    >>> clock.next(), clock.next(), clock.now
    ('soon', 'late', 5.0)
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Event]] = []
        self._set = 0

    def __len__(self) -> int:
        return len(self._events)

    def after(self, seconds: float, event: Event) -> None:
        """Let ``event`` happen so many seconds from now."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ConfigError(f"{seconds!r} seconds from now; a number of at least 0 is needed")
        heapq.heappush(self._events, (self.now + seconds, self._set, event))
        self._set += 1

    def next(self) -> Event:
        """Go on to the next event; raises IndexError where nothing is to come."""
        self.now, _, event = heapq.heappop(self._events)
        return event
