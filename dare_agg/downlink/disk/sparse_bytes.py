"""Bytes of a model's size that are 0 almost everywhere: a file with holes, read where it lies.

Parts of 64 KiB take room on the disk when something other than 0 is first written there, and not
before: a full disk is met then, as an error, and not when a page of the map is written.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dare_agg.downlink.disk.mapped import refusals, take_room
from dare_agg.downlink.grid import Positions
from dare_agg.errors import StateError
from dare_agg.files.pages import Pages

PART = 1 << 16
Bytes = NDArray[np.int8]


class SparseBytes:
    """``size`` signed bytes at ``path``; raises `StateError` for a file of another size."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            found = os.fstat(self._handle).st_size
        except OSError as error:
            raise StateError(f"{path} cannot be read: {error.strerror or error}") from error
        if found != size:
            os.close(self._handle)
            raise StateError(f"{path} has {found} bytes, {size} are due")
        self._map = mmap.mmap(self._handle, size) if size else mmap.mmap(-1, 1)
        self._values = np.frombuffer(self._map, np.int8, size)
        self._pages = Pages(self._map)
        self._wide = _parts_with_data(self._handle, size)

    @property
    def empty(self) -> bool:
        """Whether nothing but 0 was ever written."""
        return not self._wide.any()

    def read(self, where: slice | Positions) -> Bytes | None:
        """A copy of a run or of ascending positions; None where all are 0 for certain."""
        parts = _parts(where)
        if not self._wide[parts].any():
            return None
        self._pages.passed((parts.stop - parts.start) * PART)
        return np.array(self._values[where])

    def write(self, where: slice | Positions, values: Bytes | None) -> None:
        """Put bytes there (None: zeros); raises `StateError` where the disk is full."""
        parts = _parts(where)
        if values is None or not values.any():
            if not self._wide[parts].any():
                return
        elif not self._wide[parts].all():
            places = _places(where)
            found = places[values != 0] // PART
            for part in found[np.flatnonzero(np.diff(found, prepend=-1))]:
                self._widen(int(part))
        if self._wide[parts].all():
            self._values[where] = 0 if values is None else values
        else:
            places = _places(where)
            here = self._wide[places // PART]
            self._values[places[here]] = 0 if values is None else values[here]
        self._pages.passed((parts.stop - parts.start) * PART)

    def _widen(self, part: int) -> None:
        if not self._wide[part]:
            start = part * PART
            with refusals(self.path):
                take_room(self._handle, start, min(PART, self.size - start))
            self._wide[part] = True

    def flush(self) -> None:
        """Have on the disk what was written; raises `StateError` where that fails."""
        if not self.empty:
            with refusals(self.path):
                self._map.flush()

    def close(self) -> None:
        """Let go of the file; what was written stays written."""
        if self._handle >= 0:
            del self._values
            with contextlib.suppress(BufferError):  # somebody still holds a view
                self._map.close()
            os.close(self._handle)
            self._handle = -1


def create_sparse(path: Path, size: int) -> None:
    """Make a file that is all hole, in place of what is at ``path``; raises `StateError`."""
    with refusals(path):
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(handle, size)
        finally:
            os.close(handle)


def _parts(where: slice | Positions) -> slice:
    if isinstance(where, slice):
        first, last = where.start, where.stop
    else:
        first, last = (int(where[0]), int(where[-1]) + 1) if where.size else (0, 0)
    return slice(first // PART, -(-last // PART) if last > first else first // PART)


def _places(where: slice | Positions) -> Positions:
    return np.arange(where.start, where.stop) if isinstance(where, slice) else where


def _parts_with_data(handle: int, size: int) -> NDArray[np.bool_]:
    """Which parts were ever written: where the file has no hole."""
    parts = np.zeros(-(-size // PART), np.bool_)
    if not hasattr(os, "SEEK_DATA"):
        parts[:] = True
        return parts
    at = 0
    while at < size:
        try:
            start = os.lseek(handle, at, os.SEEK_DATA)
            at = os.lseek(handle, start, os.SEEK_HOLE)
        except OSError as error:
            # ENXIO: no data from here on. A file system that cannot say may have any.
            if error.errno != errno.ENXIO:
                parts[:] = True
            break
        parts[start // PART : -(-at // PART)] = True
    return parts
