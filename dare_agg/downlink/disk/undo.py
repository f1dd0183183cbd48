"""What a round changed in place, kept until the next one begins: old bytes, in order.

A file is the header of the round before (so many bytes, as they stood in its own file), then
records. Each is on the disk before what it is about is changed, so one that is cut off, or
damaged at the very end, was not needed yet.

Record: magic ``b"UNDO"`` · bytes u32 · crc32 of what follows u32 · so many bytes, as
`dare_agg.downlink.disk.undo_record` has them.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from dare_agg.downlink.disk.mapped import refusals, sync_data, write_all
from dare_agg.downlink.disk.undo_record import OldValues, decode_old, encode_old
from dare_agg.errors import StateError
from dare_agg.files.atomic import replace_file

_MAGIC = b"DAREUND2"
_HEAD = struct.Struct("<8sQI")
_RECORD = struct.Struct("<4sII")
_MARK = b"UNDO"


class UndoWriter:
    """Appends records to the undo file of a round; make one with `begin_undo`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with refusals(path):
            self._handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            self._at = os.fstat(self._handle).st_size

    def record(self, old: OldValues) -> None:
        """Have old values on the disk; raises `StateError` where it is full."""
        data = encode_old(old)
        with refusals(self.path):
            write_all(self._handle, _RECORD.pack(_MARK, len(data), zlib.crc32(data)), self._at)
            write_all(self._handle, data, self._at + _RECORD.size)
            sync_data(self._handle)
        self._at += _RECORD.size + len(data)

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


def _end_of(handle: int, at: int, end: int, path: Path) -> int | None:
    """Where the whole record at ``at`` ends; None where no whole one begins there."""
    head = os.pread(handle, _RECORD.size, at)
    if len(head) < _RECORD.size:
        return None
    mark, size, check = _RECORD.unpack(head)
    stop = at + _RECORD.size + size
    if mark == _MARK and size:
        if stop > end:
            return None
        if zlib.crc32(os.pread(handle, size, at + _RECORD.size)) == check:
            return stop
        if stop == end:  # the very last: it was being written
            return None
    raise StateError(f"{path} is damaged at byte {at} of {end}; it was left as it is")


def _read(handle: int, start: int) -> OldValues:
    _, size, _ = _RECORD.unpack(os.pread(handle, _RECORD.size, start))
    return decode_old(os.pread(handle, size, start + _RECORD.size))
