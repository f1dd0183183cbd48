"""Counts of grid steps in a file: two bytes a parameter, changed in place.

A file holds a page that says what it is, then the low half of every count, int16. High halves
stand in a second file, ``<name>.high``, which takes room on the disk only where a count has left
the 16 bits: count = low + 2¹⁶·high, low from −2¹⁵ to 2¹⁵ − 1. Both are read and written where
they lie; a process's own memory holds the part that is looked at.

The page: magic ``b"DARECNT1"`` · size u64 · state u8 (0 whole, 1 being changed) · base 32 B ·
version 32 B · the first 8 bytes of SHA-256 of these.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dare_agg.downlink.grid import Counts, Positions
from dare_agg.errors import StateError
from dare_agg.files.pages import Pages

_MAGIC = b"DARECNT1"
_PAGE = struct.Struct("<8sQB32s32s8s")
_PAGE_BYTES = 4096
# High halves are looked up in parts of so many counts.
_PART = 1 << 16
_NONE = "00" * 32


class CountsFile:
    """Counts of ``size`` parameters, to be indexed like an int32 vector by slices and positions.

    Make one with `create_counts` or `open_counts`, and close it. ``version`` is what the file
    says it holds, a name of 64 hex digits; ``dirty`` whether it is being moved to another one.
    """

    dtype = np.dtype(np.int32)

    def __init__(self, path: Path, handle: int, size: int, base: str) -> None:
        self.path, self.size, self.base = path, size, base
        self.version, self.dirty = _NONE, False
        self._handle, self._high = handle, os.open(_high(path), os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(handle, _PAGE_BYTES + 2 * size)
        self._low = np.frombuffer(self._map, "<i2", offset=_PAGE_BYTES)
        self._pages = Pages(self._map)
        self._wide = _parts_with_data(self._high, size)

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
        low = np.array(self._low[where])
        self._pages.passed(2 * (last - first))
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
        self._low[where] = low
        self._pages.passed(2 * (last - first))

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
                with _refusals(self.path):
                    _write_all(self._high, changed.tobytes(), 2 * lo)

    def mark(self, version: str, *, dirty: bool = False) -> None:
        """Have the counts on the disk, then say which version they are, or are being moved from.

        ``dirty`` comes first and is taken back last: a file that says it was not whole whenever
        something happened in between. Raises `StateError` where the disk refuses.
        """
        with _refusals(self.path):
            self.flush()
            page = _page(self.size, self.base, version, dirty)
            _write_all(self._handle, page, 0)
            os.fdatasync(self._handle)
        self.version, self.dirty = version, dirty

    def flush(self) -> None:
        """Have on the disk what was written; raises `StateError` where that fails."""
        with _refusals(self.path):
            self._map.flush()
            os.fdatasync(self._high)

    def close(self) -> None:
        """Let go of the files; what was written stays written."""
        if self._handle >= 0:
            del self._low
            with contextlib.suppress(BufferError):  # somebody still holds a view
                self._map.close()
            os.close(self._handle)
            os.close(self._high)
            self._handle = -1

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
    with _refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in (path, _high(path)):
            name.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            high = os.open(_high(path), flags, 0o600)
            os.ftruncate(high, 2 * size)
            os.close(high)
            handle = os.open(path, flags, 0o600)
            os.posix_fallocate(handle, 0, _PAGE_BYTES + 2 * size)
            counts = CountsFile(path, handle, size, base)
            counts.mark(version or base)
        except BaseException:
            for name in (path, _high(path)):
                name.unlink(missing_ok=True)
            raise
    return counts


def open_counts(path: Path, size: int, base: str) -> CountsFile:
    """Open the file at ``path``; nothing is changed.

    Raises `StateError` for one that is missing, cut off, damaged, or of another base.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        page = os.pread(handle, _PAGE.size, 0)
        found = os.fstat(handle).st_size, os.stat(_high(path)).st_size
    except OSError as error:
        raise StateError(f"counts {path} cannot be read: {error.strerror or error}") from error
    try:
        if len(page) < _PAGE.size:
            raise StateError(f"counts {path} are cut off: {len(page)} bytes are there")
        magic, held, state, of_base, version, check = _PAGE.unpack(page)
        if magic != _MAGIC or _check(page) != check or state > 1:
            raise StateError(f"{path} is no file of counts, or a damaged one")
        if of_base.hex() != base or held != size:
            raise StateError(
                f"counts {path} are of {held} parameters over base {of_base.hex()[:12]}, not "
                f"{size} over {base[:12]}"
            )
        due = _PAGE_BYTES + 2 * size, 2 * size
        if found != due:
            raise StateError(f"counts {path} have {found} bytes, {due} are due")
    except BaseException:
        os.close(handle)
        raise
    counts = CountsFile(path, handle, size, base)
    counts.version, counts.dirty = version.hex(), bool(state)
    return counts


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


def _page(size: int, base: str, version: str, dirty: bool) -> bytes:
    parts = (_MAGIC, size, int(dirty), bytes.fromhex(base), bytes.fromhex(version))
    return _PAGE.pack(*parts, _check(_PAGE.pack(*parts, bytes(8))))


def _check(page: bytes) -> bytes:
    return hashlib.sha256(page[:-8]).digest()[:8]


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


def _write_all(handle: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, at)
        view, at = view[done:], at + done


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(
            f"counts {path} cannot be written: {error.strerror or error}; free space or fix the "
            "permissions"
        ) from error
