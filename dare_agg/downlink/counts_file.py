"""Counts of grid steps in a file: two bytes a parameter, changed in place.

The low half of every count, int16, lies in a mapped file. High halves stand in a second file,
``<name>.high``, which takes room on the disk only where a count has left the 16 bits: count =
low + 2¹⁶·high, low from −2¹⁵ to 2¹⁵ − 1. Both are read and written where they lie; a process's
own memory holds the part that is looked at.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dare_agg.downlink.grid import Counts, Positions
from dare_agg.downlink.mapped import (
    MappedVector,
    create_mapped,
    open_mapped,
    refusals,
    write_all,
)
from dare_agg.errors import StateError

_KIND = "counts"
# High halves are looked up in parts of so many counts.
_PART = 1 << 16


class CountsFile:
    """Counts of ``size`` parameters, to be indexed like an int32 vector by slices and positions.

    Make one with `create_counts` or `open_counts`, and close it. ``version`` is what the file
    says it holds, a name of 64 hex digits; ``dirty`` whether it is being moved to another one.
    """

    dtype = np.dtype(np.int32)

    def __init__(self, low: MappedVector) -> None:
        self.path, self.size, self.base = low.path, low.size, low.base
        self._low = low
        with refusals(self.path):
            self._high = os.open(_high(self.path), os.O_RDWR | os.O_CLOEXEC)
        self._wide = _parts_with_data(self._high, self.size)

    @property
    def version(self) -> str:
        """The version that the file says it holds, or is being moved from."""
        return self._low.version

    @property
    def dirty(self) -> bool:
        """Whether the counts were being moved when the file was last let go of."""
        return self._low.dirty

    @property
    def shape(self) -> tuple[int, ...]:
        """As a vector's."""
        return (self.size,)

    @property
    def widened(self) -> bool:
        """Whether any count may have left 16 bits."""
        return bool(self._wide.any())

    def __getitem__(self, where: slice | Positions) -> Counts:
        """A copy of the counts of a run, or at ascending positions, int32."""
        low, high = self.halves(where)
        counts = low.astype(np.int32)
        if high is not None:
            counts += high.astype(np.int32) << 16
        return counts

    def __setitem__(self, where: slice | Positions, counts: NDArray[np.signedinteger]) -> None:
        low, high = halves_of(counts)
        self.put_halves(where, low, high)

    def halves(
        self, where: slice | Positions
    ) -> tuple[NDArray[np.int16], NDArray[np.int16] | None]:
        """Copies of the low halves and, where any may be other than 0, of the high ones."""
        first, last = self._reach(where)
        low = np.array(self._low.values[where])
        self._low.passed(last - first)
        if last == first or not self._wide[first // _PART : -(-last // _PART)].any():
            return low, None
        high = np.zeros(low.size, np.int16)
        for part, lo, hi, at in _cut(where, first, last):
            if self._wide[part]:
                high[at] = self._read_high(lo, hi)[_within(where, at, lo)]
        return low, high

    def put_halves(
        self,
        where: slice | Positions,
        low: NDArray[np.int16],
        high: NDArray[np.int16] | None,
    ) -> None:
        """Write what `halves` gives; raises `StateError` where the disk is full."""
        first, last = self._reach(where)
        # First what may find no room.
        if high is not None or self._wide[first // _PART : -(-last // _PART)].any():
            self._put_high(where, first, last, np.zeros_like(low) if high is None else high)
        self._low.values[where] = low
        self._low.passed(last - first)

    def _read_high(self, lo: int, hi: int) -> NDArray[np.int16]:
        return np.frombuffer(os.pread(self._high, 2 * (hi - lo), 2 * lo), "<i2")

    def _put_high(
        self, where: slice | Positions, first: int, last: int, high: NDArray[np.int16]
    ) -> None:
        for part, lo, hi, at in _cut(where, first, last):
            if not self._wide[part] and not high[at].any():
                continue
            held = self._read_high(lo, hi)
            changed = held.copy()
            changed[_within(where, at, lo)] = high[at]
            if not np.array_equal(changed, held):
                self._wide[part] = True
                with refusals(self.path):
                    write_all(self._high, changed.tobytes(), 2 * lo)

    def mark(self, version: str, *, dirty: bool = False) -> None:
        """Have the counts on the disk, then say which version they are, or are being moved from.

        ``dirty`` comes first and is taken back last: a file that says it was not whole whenever
        something happened in between. Raises `StateError` where the disk refuses.
        """
        self._sync_high()
        self._low.mark(version, dirty=dirty)

    def flush(self) -> None:
        """Have on the disk what was written; raises `StateError` where that fails."""
        self._sync_high()
        self._low.flush()

    def close(self) -> None:
        """Let go of the files; what was written stays written."""
        if self._high >= 0:
            self._low.close()
            os.close(self._high)
            self._high = -1

    def _sync_high(self) -> None:
        with refusals(self.path):
            os.fdatasync(self._high)

    def __enter__(self) -> CountsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _reach(self, where: slice | Positions) -> tuple[int, int]:
        """The first position and the one after the last."""
        if isinstance(where, slice):
            lo, hi, step = where.indices(self.size)
            if step != 1:
                raise ValueError(f"slice with step {step}; counts are read in runs")
            return lo, max(lo, hi)
        return (int(where[0]), int(where[-1]) + 1) if where.size else (0, 0)


def create_counts(path: Path, size: int, base: str, version: str = "") -> CountsFile:
    """Make a file of zeros over the base of this name, in place of what is at ``path``.

    All its room is taken at once, so that a full disk is met here. Raises `StateError`.
    """
    high = _high(path)
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        high.unlink(missing_ok=True)
        try:
            handle = os.open(high, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(handle, 2 * size)
            finally:
                os.close(handle)
            return CountsFile(create_mapped(path, _KIND, "<i2", size, base, version))
        except BaseException:
            forget_counts(path)
            raise


def open_counts(path: Path, size: int, base: str) -> CountsFile:
    """Open the file at ``path``; nothing is changed.

    Raises `StateError` for one that is missing, cut off, damaged, or of another base.
    """
    low = open_mapped(path, _KIND, "<i2", size, base)
    try:
        found = os.stat(_high(path)).st_size
        if found != 2 * size:
            raise StateError(f"counts {_high(path)} have {found} bytes, {2 * size} are due")
        return CountsFile(low)
    except OSError as error:
        low.close()
        raise StateError(
            f"counts {_high(path)} cannot be read: {error.strerror or error}"
        ) from error
    except BaseException:
        low.close()
        raise


def forget_counts(path: Path) -> None:
    """Remove a file of counts, whole or not; one that is not there is forgotten already."""
    for name in (path, _high(path)):
        with contextlib.suppress(OSError):
            name.unlink(missing_ok=True)


def halves_of(
    counts: NDArray[np.signedinteger],
) -> tuple[NDArray[np.int16], NDArray[np.int16] | None]:
    """The low halves of int32 counts and the high ones, None where all are 0."""
    low = counts.astype(np.int16)
    rest = counts.astype(np.int64) - low
    return low, (rest >> 16).astype(np.int16) if rest.any() else None


def _high(path: Path) -> Path:
    return path.with_name(path.name + ".high")


def _parts_with_data(handle: int, size: int) -> NDArray[np.bool_]:
    """Which parts of the high halves were ever written: where the file has no hole."""
    parts = np.zeros(-(-size // _PART) + 1, np.bool_)
    at = 0
    while at < 2 * size:
        try:
            start = os.lseek(handle, at, os.SEEK_DATA)
            at = os.lseek(handle, start, os.SEEK_HOLE)
        except OSError as error:
            # ENXIO: no data from here on. A file system that cannot say may have any.
            if error.errno != errno.ENXIO:
                parts[:] = True
            break
        parts[start // (2 * _PART) : -(-at // (2 * _PART))] = True
    return parts


def _cut(where: slice | Positions, first: int, last: int) -> Iterator[tuple[int, int, int, slice]]:
    """Cut ascending places into parts: number, its range, and which of the places lie there."""
    for part in range(first // _PART, -(-last // _PART)):
        lo, hi = max(first, part * _PART), min(last, (part + 1) * _PART)
        if isinstance(where, slice):
            yield part, lo, hi, slice(lo - first, hi - first)
        else:
            a, b = np.searchsorted(where, (lo, hi))
            yield part, lo, hi, slice(int(a), int(b))


def _within(where: slice | Positions, at: slice, lo: int) -> slice | Positions:
    return slice(None) if isinstance(where, slice) else where[at] - lo
