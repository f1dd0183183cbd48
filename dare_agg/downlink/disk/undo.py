"""What a round changed in place, kept until the next one begins: old bytes, in order.

A file is the header of the round before (so many bytes, as they stood in its own file), then
records. Each is on the disk before what it is about is changed, so one that is cut off, or
damaged at the very end, was not needed yet.

Record: magic ``b"UNDO"`` · first position u64 · positions u32 · bytes a gap u8 · whether high
halves follow u8 · crc32 of the rest u32; then gaps between positions, low halves int16, rest u8,
high halves int16.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dare_agg.downlink.disk.mapped import refusals, sync_data, write_all
from dare_agg.downlink.disk.rest import Codes
from dare_agg.downlink.grid import Positions
from dare_agg.errors import StateError
from dare_agg.files.atomic import replace_file

_MAGIC = b"DAREUND1"
_HEAD = struct.Struct("<8sQI")
_RECORD = struct.Struct("<4sQIBBI")
_MARK = b"UNDO"
# No gap where positions are neighbours.
_GAPS: Mapping[int, np.dtype[np.unsignedinteger]] = {
    width: np.dtype(f"<u{max(1, width)}") for width in (0, 1, 2, 4, 8)
}


@dataclass(frozen=True)
class OldValues:
    """What stood at ascending positions; ``high`` is None where all high halves were 0."""

    positions: Positions
    low: NDArray[np.int16]
    rest: Codes
    high: NDArray[np.int16] | None


class UndoWriter:
    """Appends records to the undo file of a round; make one with `begin_undo`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with refusals(path):
            self._handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            self._at = os.fstat(self._handle).st_size

    def record(self, old: OldValues) -> None:
        """Have old values on the disk; raises `StateError` where it is full."""
        count, positions = old.positions.size, old.positions
        gaps = np.diff(positions)
        widest = int(gaps.max()) if gaps.size else 1
        width = next(w for w in _GAPS if widest < 1 << 8 * w or widest == 1)
        parts = [gaps.astype(_GAPS[width]).tobytes()] if width else []
        parts += [old.low.astype("<i2").tobytes(), old.rest.tobytes()]
        if old.high is not None:
            parts.append(old.high.astype("<i2").tobytes())
        check = 0
        for part in parts:
            check = zlib.crc32(part, check)
        first, high = int(positions[0]), old.high is not None
        with refusals(self.path):
            for part in (_RECORD.pack(_MARK, first, count, width, high, check), *parts):
                write_all(self._handle, part, self._at)
                self._at += len(part)
            sync_data(self._handle)

    def close(self) -> None:
        """Let go of the file; it stays."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def begin_undo(path: Path, header: bytes) -> UndoWriter:
    """Begin a round's undo file in place of the last one's; raises `StateError`."""
    replace_file(path, (_HEAD.pack(_MAGIC, len(header), zlib.crc32(header)), header), mode=0o600)
    return UndoWriter(path)


def header_before(path: Path) -> bytes:
    """The header that an undo file leads back to, b"" where there is no file.

    Raises `StateError` for one that is damaged.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
            if len(head) == _HEAD.size:
                magic, size, check = _HEAD.unpack(head)
                header = file.read(size) if magic == _MAGIC else b""
                if magic == _MAGIC and len(header) == size and zlib.crc32(header) == check:
                    return header
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}") from error
    raise StateError(f"{path} is no undo file, or a damaged one; it was left as it is")


def old_values(path: Path) -> Iterator[OldValues]:
    """Yield the records of an undo file, newest first.

    Raises `StateError` for one that is damaged before its end.
    """
    with path.open("rb") as file:
        _, size, _ = _HEAD.unpack(file.read(_HEAD.size))
        at, end = _HEAD.size + size, os.fstat(file.fileno()).st_size
        found: list[int] = []
        while (stop := _end_of(file.fileno(), at, end, path)) is not None:
            found.append(at)
            at = stop
        for start in reversed(found):
            yield _read(file.fileno(), start)


def forget_records(path: Path) -> None:
    """Cut an undo file off after its header, once its records were applied; frees the room."""
    with refusals(path):
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _, size, _ = _HEAD.unpack(os.pread(handle, _HEAD.size, 0))
            os.ftruncate(handle, _HEAD.size + size)
            os.fsync(handle)
        finally:
            os.close(handle)


def _payload_bytes(count: int, width: int, high: int) -> int:
    return (count - 1) * width + (5 if high else 3) * count


def _end_of(handle: int, at: int, end: int, path: Path) -> int | None:
    """Where the whole record at ``at`` ends; None where no whole one begins there."""
    head = os.pread(handle, _RECORD.size, at)
    if len(head) < _RECORD.size:
        return None
    mark, _, count, width, high, check = _RECORD.unpack(head)
    stop = at + _RECORD.size + _payload_bytes(count, width, high)
    if mark == _MARK and width in _GAPS and count and stop > end:
        return None
    whole = mark == _MARK and width in _GAPS and bool(count)
    if whole:
        data = os.pread(handle, stop - at - _RECORD.size, at + _RECORD.size)
        if zlib.crc32(data) == check:
            return stop
        if stop == end:  # the very last: it was being written
            return None
    raise StateError(f"{path} is damaged at byte {at} of {end}; it was left as it is")


def _read(handle: int, start: int) -> OldValues:
    _, first, count, width, high, _ = _RECORD.unpack(os.pread(handle, _RECORD.size, start))
    size = _payload_bytes(count, width, high)
    data = os.pread(handle, size, start + _RECORD.size)
    gaps = np.ones(count - 1, np.int64)
    if width:
        gaps = np.frombuffer(data, _GAPS[width], count - 1).astype(np.int64)
    positions = np.cumsum(np.concatenate(([first], gaps)))
    at = (count - 1) * width
    low = np.frombuffer(data, "<i2", count, at)
    rest = np.frombuffer(data, np.uint8, count, at + 2 * count)
    halves = np.frombuffer(data, "<i2", count, at + 3 * count) if high else None
    return OldValues(positions, low, rest, halves)
