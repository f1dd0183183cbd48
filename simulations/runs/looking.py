"""Looking at something again and again while a block of code lasts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self


class Looking:
    """Calls ``look`` at once and every ``period`` seconds from a thread of its own.

    An OSError of ``look`` says that there is nothing left to look at. ``cpu_seconds`` is what
    looking has cost so far.
    """

    cpu_seconds = 0.0

    def __init__(self, look: Callable[[], None], period: float) -> None:
        self._look, self._period = look, period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            try:
                self._look()
            except OSError:
                return
            self.cpu_seconds = time.thread_time()
            if self._stop.wait(self._period):
                return
