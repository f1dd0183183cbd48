"""Patience with a SuperLink that fails for a moment.

Flower repeats a request when the SuperLink cannot be reached, but not when it answers
500. A SuperLink with a database answers so whenever SQLite was locked for five seconds, which
a busy disk is enough for, and the ServerApp, hours of rounds with it, would end. The request
changed nothing then (its transaction was rolled back), so it is sent again.
"""

from __future__ import annotations

import threading
import time

from flwr.serverapp import Grid

from dare_agg.errors import RunError
from dare_agg.flower.internals import GiveUp, change_give_up

PATIENCE_SECONDS = 180.0
# Failures further apart than this are not one and the same.
_QUIET_SECONDS = 60.0
_SERVER_ERROR = 500


class _Patience:
    """Decides when to give up: as Flower does, except for 500, which gets some time."""

    def __init__(self, flower: GiveUp, seconds: float) -> None:
        self.flower, self.seconds = flower, seconds
        self._first = self._last = float("-inf")
        self._lock = threading.Lock()

    def __call__(self, error: Exception) -> bool:
        if status_of(error) != _SERVER_ERROR:
            return self.flower(error)
        now = time.monotonic()
        with self._lock:
            if now - self._last > _QUIET_SECONDS:
                self._first = now
            self._last = now
            return now - self._first > self.seconds


def be_patient(grid: Grid, seconds: float = PATIENCE_SECONDS) -> None:
    """Have the grid's requests repeated while the SuperLink answers 500, for so long.

    A grid without Flower's retries (in memory, simulation) stays as it is.
    """

    def patient(flower: GiveUp) -> GiveUp:
        return flower if isinstance(flower, _Patience) else _Patience(flower, seconds)

    change_give_up(grid, patient)


def status_of(error: BaseException) -> int:
    """The HTTP status an error stands for; 0 for none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def named(error: BaseException) -> BaseException:
    """Say what a SuperLink's failure means and what to do; other errors stay as they are."""
    if status_of(error) < _SERVER_ERROR:
        return error
    return RunError(
        f"the SuperLink failed for {PATIENCE_SECONDS:g} s with status {status_of(error)}: its log "
        "names the reason, often a full disk or a locked database; mend it, then resume the run",
        reason="superlink",
    )
