"""What is said while too few clients are online: how many are, and for how long."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

LOG = logging.getLogger("flwr")
SILENT_SECONDS = 5.0
MOST_SECONDS = 600.0


@dataclass
class Waiting:
    """Says that ``needed`` clients are waited for: when those online change, else ever more rarely.

    Nothing is said in the first `SILENT_SECONDS`, nor more often than that. `dare-agg run` shows
    the line in its terminal.
    """

    needed: int
    began: float = field(default_factory=time.monotonic)
    _said: tuple[int, int] | None = None
    _last: float = 0.0
    _pause: float = 2 * SILENT_SECONDS

    def say(self, online: int, refused: int = 0) -> None:
        """Look whether something is to be said now; ``online`` of the clients can take part."""
        now = time.monotonic()
        quiet = now - max(self.began, self._last)
        if quiet < SILENT_SECONDS or (self._said == (online, refused) and quiet < self._pause):
            return
        if self._said == (online, refused):
            self._pause = min(2 * self._pause, MOST_SECONDS)
        self._said, self._last = (online, refused), now
        turned = f", {refused} refused" if refused else ""
        LOG.info(
            "waiting for clients (%d of %d online%s, for %.0f s)",
            online, self.needed, turned, now - self.began,
        )  # fmt: skip
