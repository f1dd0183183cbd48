"""The sign that most elements have, which decides where entries cancel exactly."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock


class MajoritySign:
    """Counted when first needed, once for all threads.

    ``balance`` makes a pass over the deltas and returns how many elements are positive less how
    many are negative.
    """

    def __init__(self, balance: Callable[[], int]) -> None:
        self._balance = balance
        self._lock = Lock()
        self._sign: int | None = None

    def sign(self) -> int:
        """1, -1, or 0 where both are as many."""
        with self._lock:
            if self._sign is None:
                balance = self._balance()
                self._sign = (balance > 0) - (balance < 0)
            return self._sign
