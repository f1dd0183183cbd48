"""Canonical bytes: one encoding for each value, and a reader that takes nothing else.

All integers are little-endian and of fixed width, lists carry a u32 count, text and bytes a
u32 length. Two different values never encode to the same bytes, so digests and signatures
over encodings bind the values.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise

from dare_agg.errors import ProtocolError

DIGEST_BYTES = 32


def u8(value: int) -> bytes:
    """One byte."""
    return struct.pack("<B", value)


def u32(value: int) -> bytes:
    """Four bytes, little-endian."""
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    """Eight bytes, little-endian."""
    return struct.pack("<Q", value)


def f64(value: float) -> bytes:
    """IEEE 754 binary64, little-endian."""
    return struct.pack("<d", value)


def blob(value: bytes) -> bytes:
    """Bytes with their length before them."""
    return u32(len(value)) + value


def identifiers(values: Sequence[int]) -> bytes:
    """A list of party ids."""
    return u32(len(values)) + struct.pack(f"<{len(values)}I", *values)


def texts(values: Sequence[str]) -> bytes:
    """A list of texts."""
    return u32(len(values)) + b"".join(blob(value.encode()) for value in values)


class Reader:
    """Reads canonical bytes front to back; every limit is checked before use.

    Raises `ProtocolError` (reason "malformed") naming what was being read.
    """

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._at = 0
        self.what = what

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        stop = self._at + count
        if stop > len(self._data):
            raise self.bad(f"{self.left} bytes are left where {count} are needed")
        piece = self._data[self._at : stop]
        self._at = stop
        return piece

    def u8(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def u32(self) -> int:
        """A little-endian integer of four bytes."""
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        """A little-endian integer of eight bytes."""
        return int.from_bytes(self.take(8), "little")

    def f64(self) -> float:
        """A binary64 number; may be NaN or infinite."""
        return float(struct.unpack("<d", self.take(8))[0])

    def blob(self, limit: int) -> bytes:
        """Bytes behind their length, of at most ``limit``."""
        length = self.u32()
        if length > limit:
            raise self.bad(f"a field of {length} bytes, at most {limit} are allowed")
        return self.take(length)

    def count(self, each: int, most: int) -> int:
        """A list length of at most ``most``, whose items of ``each`` bytes fit in what is left."""
        length = self.u32()
        if length > most:
            raise self.bad(f"a list of {length} items, at most {most} are possible")
        if length * each > self.left:
            raise self.bad(f"a list of {length} items does not fit in {self.left} bytes")
        return length

    def texts(self, most: int, limit: int) -> tuple[str, ...]:
        """A list of up to ``most`` texts of up to ``limit`` bytes each."""
        count = self.count(4, most)
        try:
            return tuple(self.blob(limit).decode() for _ in range(count))
        except UnicodeDecodeError as error:
            raise self.bad("a text that is not UTF-8") from error

    def identifiers(self, most: int) -> tuple[int, ...]:
        """At most ``most`` party ids, strictly ascending: no duplicates, one order."""
        length = self.count(4, most)
        ids = struct.unpack(f"<{length}I", self.take(4 * length))
        if any(a >= b for a, b in pairwise(ids)):
            raise self.bad("party ids are not strictly ascending")
        return ids

    def done(self) -> None:
        """Raise unless everything was read."""
        if self.left:
            raise self.bad(f"{self.left} bytes follow its end")

    def bad(self, why: str) -> ProtocolError:
        """The error to raise for these bytes, with ``why``."""
        return ProtocolError(
            f"{self.what}: {why}; run the same dare-agg at every party", reason="malformed"
        )
