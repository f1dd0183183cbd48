"""Small whole numbers, 0 almost everywhere, in blocks of a file: each block has the bits it needs.

A number has 16 bits, dealt to rows: the lowest 4, then 2, 1, 1 and 8. Of a row, blocks of 1,024
numbers exist where a bit other than 0 was ever written: units of 128 bytes, as many as the row has
bits, at the end of what is taken. So numbers that are a few bits wide take a few bits, and a rare
large one costs its neighbours only. Room is taken before a block is there: a full disk is met as
an error, not when a page of the map is written.

A page says what it is (as `dare_agg.downlink.disk.mapped` has it); the first unit of each block
follows, u32, row by row, 0 for none; then the units, of which the first eight are 0 for ever.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dare_agg.downlink.disk.mapped import (
    PAGE_BYTES,
    check_page,
    first_page,
    refusals,
    take_room,
    write_all,
)
from dare_agg.downlink.grid import Positions
from dare_agg.errors import StateError
from dare_agg.files.pages import Pages

WIDTHS = (4, 2, 1, 1, 8)
_BLOCK_BITS = 10
_BLOCK = 1 << _BLOCK_BITS
_UNIT = _BLOCK // 8
# Where a block that is not there is read.
_ZEROS = max(WIDTHS)
# Room is taken so many units at a time.
_TAKEN = 1 << 11
# log2 of how many numbers of a row a byte holds, by bits of each.
_PACKED = {1: 3, 2: 2, 4: 1, 8: 0}
Bits = NDArray[np.uint16]
_Fields = NDArray[np.uint8]


class SparseBits:
    """``size`` numbers of 16 bits at ``path``, which must be of this ``kind`` and base.

    Raises `StateError` for a file that is missing, cut off, damaged or foreign.
    """

    def __init__(self, path: Path, kind: str, size: int, base: str) -> None:
        self.path, self.size = path, size
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise StateError(f"{path} cannot be read: {error.strerror or error}") from error
        try:
            check_page(self._handle, path, kind, sum(WIDTHS) // 8, size, base, _file_bytes(size))
            self._map = mmap.mmap(self._handle, _file_bytes(size))
        except BaseException:
            os.close(self._handle)
            raise
        blocks = _blocks(size)
        firsts = np.frombuffer(self._map, "<u4", len(WIDTHS) * blocks, PAGE_BYTES)
        self._firsts = firsts.reshape(len(WIDTHS), blocks)
        self._units = np.frombuffer(self._map, np.uint8, -1, _units_at(size))
        self._pages = Pages(self._map)
        # Units in use, and those that there is room for; known once one is to be added.
        self._used = self._room = 0

    @property
    def empty(self) -> bool:
        """Whether nothing but 0 was ever written."""
        return not self._firsts.any()

    def read(self, where: slice | Positions) -> Bits | None:
        """A copy of a run or of ascending positions; None where all are 0 for certain."""
        found: Bits | None = None
        shift = 0
        for row, width in enumerate(WIDTHS):
            blocks = _blocks_of(where)
            if self._firsts[row, blocks].any():
                if isinstance(where, slice):
                    bits = self._run(row, width, where).astype(np.uint16)
                else:
                    bits = self._at(row, width, where).astype(np.uint16)
                bits <<= shift
                found = bits if found is None else np.bitwise_or(found, bits, out=found)
                self._pages.passed((blocks.stop - blocks.start) * width * _UNIT)
            shift += width
        return found

    def write(self, where: slice | Positions, was: Bits | None, numbers: Bits | None) -> None:
        """Put numbers (None: zeros) in place of those that `read` gave.

        Raises `StateError` where the disk is full; nothing was changed then.
        """
        if was is None and numbers is None:
            return
        blocks = _blocks_of(where)
        if isinstance(where, slice):
            where = np.arange(where.start, where.stop)
        # Bytes wrap, so what numbers of one byte differ by can be added in turn.
        change, shift = [], 0
        for row, width in enumerate(WIDTHS):
            new = _fields(numbers, shift, width)
            if new is not None and not self._firsts[row, blocks].all():
                self._add(row, width, where[new != 0])
            old = _fields(was, shift, width)
            if new is None or old is None:
                change.append(-old if new is None else new)  # type: ignore[operator]
            else:
                change.append(np.subtract(new, old, out=new))
            shift += width
        for row, width in enumerate(WIDTHS):
            if change[row].any():
                change[row] <<= _shifts(width, where)
                np.add.at(self._units, self._bytes_of(row, width, where), change[row])
                self._pages.passed((blocks.stop - blocks.start) * width * _UNIT)

    def flush(self) -> None:
        """Have on the disk what was written; raises `StateError` where that fails."""
        if not self.empty:
            with refusals(self.path):
                self._map.flush()

    def close(self) -> None:
        """Let go of the file; what was written stays written."""
        if self._handle >= 0:
            del self._firsts, self._units
            with contextlib.suppress(BufferError):  # somebody still holds a view
                self._map.close()
            os.close(self._handle)
            self._handle = -1

    # --- a row: 8 // width numbers to a byte, the first lowest ------------------------------

    def _bytes_of(self, row: int, width: int, positions: Positions) -> Positions:
        found = self._firsts[row].take(positions >> _BLOCK_BITS).astype(np.int64)
        found *= _UNIT
        found += (positions & (_BLOCK - 1)) >> _PACKED[width]
        return found

    def _at(self, row: int, width: int, positions: Positions) -> _Fields:
        found = self._units.take(self._bytes_of(row, width, positions))
        found >>= _shifts(width, positions)
        found &= _mask(width)
        return found

    def _run(self, row: int, width: int, where: slice) -> _Fields:
        blocks = _blocks_of(where)
        firsts = self._firsts[row, blocks].astype(np.int64)
        units = self._units.reshape(-1, _UNIT)[firsts[:, None] + np.arange(width)].reshape(-1)
        each = 8 // width
        fields = np.empty((units.size, each), np.uint8)
        for place in range(each):
            np.right_shift(units, np.uint8(place * width), out=fields[:, place])
        fields &= _mask(width)
        skipped = blocks.start * _BLOCK
        return fields.reshape(-1)[where.start - skipped : where.stop - skipped]

    def _add(self, row: int, width: int, positions: Positions) -> None:
        """Have blocks for what is other than 0 at ascending positions."""
        blocks = positions >> _BLOCK_BITS
        blocks = blocks[np.flatnonzero(np.diff(blocks, prepend=-1))]
        blocks = blocks[self._firsts[row, blocks] == 0]
        if not blocks.size:
            return
        if not self._used:
            self._find_end()
        start, self._used = self._used, self._used + width * blocks.size
        try:
            while self._room < self._used:
                with refusals(self.path):
                    at = _units_at(self.size) + self._room * _UNIT
                    take_room(self._handle, at, min(_TAKEN * _UNIT, len(self._map) - at))
                self._room += _TAKEN
        except StateError:
            self._used = start
            raise
        self._units[start * _UNIT : self._used * _UNIT] = 0
        self._firsts[row, blocks] = np.arange(start, self._used, width)

    def _find_end(self) -> None:
        """Find the end of the units in use.

        What a round that broke off wrote beyond is made 0 on the disk before any block names it.
        """
        with refusals(self.path):
            take_room(self._handle, 0, _units_at(self.size) + _ZEROS * _UNIT)
        ends = [int(self._firsts[row].max()) + width for row, width in enumerate(WIDTHS)]
        self._used = self._room = max(_ZEROS, *ends)
        start, piece = _units_at(self.size) + self._used * _UNIT, _TAKEN * _UNIT
        left = _written(self._handle, start, len(self._map))
        for first, last in left:
            for at in range(first, last, piece):
                self._map[at : min(last, at + piece)] = bytes(min(last - at, piece))
        if left:
            with refusals(self.path):
                self._map.flush()


def create_sparse(path: Path, kind: str, size: int, base: str) -> None:
    """Make a file that is all hole, in place of what is at ``path``; raises `StateError`."""
    with refusals(path):
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(handle, _file_bytes(size))
            write_all(handle, first_page(kind, size, sum(WIDTHS) // 8, False, base, base), 0)
        finally:
            os.close(handle)


def _blocks(size: int) -> int:
    return -(-size // _BLOCK)


def _units_at(size: int) -> int:
    table = 4 * len(WIDTHS) * _blocks(size)
    return PAGE_BYTES + -(-table // PAGE_BYTES) * PAGE_BYTES


def _file_bytes(size: int) -> int:
    """How long the file is, holes included."""
    return _units_at(size) + (_ZEROS + sum(WIDTHS) * _blocks(size)) * _UNIT


def _blocks_of(where: slice | Positions) -> slice:
    if isinstance(where, slice):
        first, last = where.start, where.stop
    else:
        first, last = (int(where[0]), int(where[-1]) + 1) if where.size else (0, 0)
    start = first // _BLOCK
    return slice(start, -(-last // _BLOCK) if last > first else start)


def _fields(numbers: Bits | None, shift: int, width: int) -> _Fields | None:
    if numbers is None:
        return None
    fields = (numbers >> shift).astype(np.uint8)
    fields &= _mask(width)
    return fields


def _mask(width: int) -> np.uint8:
    return np.uint8((1 << width) - 1)


def _shifts(width: int, positions: Positions) -> _Fields | np.uint8:
    if width == 8:
        return np.uint8(0)
    shifts = positions.astype(np.uint8)
    shifts &= np.uint8(8 // width - 1)
    shifts *= np.uint8(width)
    return shifts


def _written(handle: int, start: int, end: int) -> list[tuple[int, int]]:
    """The stretches of a file that are no holes; none where the system cannot say."""
    found: list[tuple[int, int]] = []
    at = start
    while at < end and hasattr(os, "SEEK_DATA"):
        try:
            first = os.lseek(handle, at, os.SEEK_DATA)
            at = os.lseek(handle, first, os.SEEK_HOLE)
        except OSError:  # ENXIO: nothing from here on
            break
        found.append((max(start, first), at))
    # A file system that knows no holes calls all of the file data.
    told = sum(last - first for first, last in found)
    return found if told <= 512 * os.fstat(handle).st_blocks else []
