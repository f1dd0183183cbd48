"""Buffers that are used again: fresh memory costs more than the arithmetic done in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_SMALLEST = 1 << 12


class _Free(threading.local):
    """A thread's buffers that nobody uses now, by size."""

    def __init__(self) -> None:
        self.by_size: dict[int, list[NDArray[np.uint8]]] = {}


_FREE = _Free()


@contextmanager
def borrowed(count: int, dtype: DTypeLike = np.float32) -> Iterator[NDArray[Any]]:
    """Lend an array of ``count`` elements with undefined contents, until the block ends."""
    needed = count * np.dtype(dtype).itemsize
    size = max(_SMALLEST, 1 << max(0, needed - 1).bit_length())
    free = _FREE.by_size.setdefault(size, [])
    buffer = free.pop() if free else np.empty(size, np.uint8)
    try:
        yield buffer[:needed].view(dtype)
    finally:
        free.append(buffer)
