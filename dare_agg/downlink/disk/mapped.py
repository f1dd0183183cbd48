"""A vector of a model's size in a file, read and written where it lies.

A page says what it is, the values follow: magic ``b"DAREVEC1"`` · kind 16 B · size u64 · bytes a
value u8 · state u8 (0 whole, 1 being changed) · base 32 B · version 32 B · the first 8 bytes of
SHA-256 of these. Nothing of it counts as this process's own memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dare_agg.errors import StateError
from dare_agg.files.atomic import REMEDY
from dare_agg.files.pages import Pages

_MAGIC = b"DAREVEC1"
_PAGE = struct.Struct("<8s16sQBB32s32s8s")
PAGE_BYTES = 4096
_PIECE = 1 << 20
NO_NAME = "00" * 32


class MappedVector:
    """The vector ``values`` of a file; make one with `create_mapped` or `open_mapped`.

    ``version`` is a name of 64 hex digits that the file bears, ``dirty`` whether it is being
    moved to another one.
    """

    def __init__(
        self, path: Path, handle: int, kind: str, dtype: DTypeLike, size: int, base: str
    ) -> None:
        self.path, self.kind, self.size, self.base = path, kind, size, base
        self.version, self.dirty = NO_NAME, False
        self._handle, self._dtype = handle, np.dtype(dtype)
        self._map = mmap.mmap(handle, PAGE_BYTES + size * self._dtype.itemsize)
        self.values: NDArray[Any] = np.frombuffer(self._map, self._dtype, size, PAGE_BYTES)
        self._pages = Pages(self._map)

    def passed(self, count: int) -> None:
        """Note that so many more values were looked at and are not needed again soon."""
        self._pages.passed(count * self._dtype.itemsize)

    def mark(self, version: str, *, dirty: bool = False) -> None:
        """Have the values on the disk, then say what they are, or are being moved from.

        Raises `StateError` where the disk refuses.
        """
        self.flush()
        page = first_page(self.kind, self.size, self._dtype.itemsize, dirty, self.base, version)
        with refusals(self.path):
            write_all(self._handle, page, 0)
            sync_data(self._handle)
        self.version, self.dirty = version, dirty

    def flush(self) -> None:
        """Have on the disk what was written; raises `StateError` where that fails."""
        with refusals(self.path):
            self._map.flush()

    def close(self) -> None:
        """Let go of the file; what was written stays written."""
        if self._handle >= 0:
            del self.values
            with contextlib.suppress(BufferError):  # somebody still holds a view
                self._map.close()
            os.close(self._handle)
            self._handle = -1


def create_mapped(
    path: Path, kind: str, dtype: DTypeLike, size: int, base: str, version: str = ""
) -> MappedVector:
    """Make a file of zeros over the base of this name, in place of what is at ``path``.

    All its room is taken at once, so that a full disk is met here and not in the middle of a
    round. Raises `StateError`.
    """
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                take_room(handle, 0, PAGE_BYTES + size * np.dtype(dtype).itemsize)
                vector = MappedVector(path, handle, kind, dtype, size, base)
            except BaseException:
                os.close(handle)
                raise
            vector.mark(version or base)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return vector


def open_mapped(path: Path, kind: str, dtype: DTypeLike, size: int, base: str) -> MappedVector:
    """Open the file at ``path``; nothing is changed.

    Raises `StateError` for one that is missing, cut off, damaged, of another kind or base.
    """
    width = np.dtype(dtype).itemsize
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise StateError(f"{kind} {path} cannot be read: {error.strerror or error}") from error
    try:
        version, dirty = check_page(
            handle, path, kind, width, size, base, PAGE_BYTES + width * size
        )
        vector = MappedVector(path, handle, kind, dtype, size, base)
    except BaseException:
        os.close(handle)
        raise
    vector.version, vector.dirty = version, dirty
    return vector


def check_page(
    handle: int, path: Path, kind: str, width: int, size: int, base: str, nbytes: int
) -> tuple[str, bool]:
    """Return the version that a file's first page says, and whether it was being moved.

    Raises `StateError` for a file that is cut off, damaged, of another kind, size or base.
    """
    page, found = os.pread(handle, _PAGE.size, 0), os.fstat(handle).st_size
    if len(page) < _PAGE.size:
        raise StateError(f"{kind} {path} are cut off: {len(page)} bytes are there")
    magic, held_kind, held, held_width, state, of_base, version, check = _PAGE.unpack(page)
    if magic != _MAGIC or _check(page) != check or state > 1:
        raise StateError(f"{path} is no file of {kind}, or a damaged one")
    if (held_kind.rstrip(b"\0"), held_width) != (kind.encode(), width):
        raise StateError(f"{path} holds {held_kind.rstrip(bytes(1))!r}, not {kind}")
    if of_base.hex() != base or held != size:
        raise StateError(
            f"{kind} {path} are of {held} parameters over base {of_base.hex()[:12]}, not "
            f"{size} over {base[:12]}"
        )
    if found != nbytes:
        raise StateError(f"{kind} {path} have {found} bytes, {nbytes} are due")
    return version.hex(), bool(state)


def take_room(handle: int, start: int, nbytes: int) -> None:
    """Take room on the disk for zeros at the end or in a hole of a file; raises `OSError`."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, start, nbytes)
        return
    for at in range(start, start + nbytes, _PIECE):
        write_all(handle, bytes(min(_PIECE, start + nbytes - at)), at)


def sync_data(handle: int) -> None:
    """Have a file's bytes on the disk; raises `OSError`."""
    getattr(os, "fdatasync", os.fsync)(handle)


def write_all(handle: int, data: bytes | memoryview, at: int) -> None:
    """Write all of ``data`` from byte ``at`` on; raises `OSError`."""
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, at)
        view, at = view[done:], at + done


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into `StateError` with a remedy."""
    try:
        yield
    except OSError as error:
        raise StateError(
            f"{path} cannot be written: {error.strerror or error}; {REMEDY}"
        ) from error


def first_page(kind: str, size: int, width: int, dirty: bool, base: str, version: str) -> bytes:
    """The page a file begins with, but for the zeros that fill it."""
    names = bytes.fromhex(base), bytes.fromhex(version)
    parts = (_MAGIC, kind.encode(), size, width, int(dirty), *names)
    return _PAGE.pack(*parts, _check(_PAGE.pack(*parts, bytes(8))))


def _check(page: bytes) -> bytes:
    return hashlib.sha256(page[:-8]).digest()[:8]
