"""What stood at a round's positions, in few bytes: one or two a position at first, four at most.

Positions are ascending. A record holds how they follow one another, the old low halves of counts,
what stood above, and rests, each in the way that takes least:

- positions after the first: nothing where all are neighbours; a bit for each from the first to the
  last; or bytes of gaps (0: the gap is in a list of u64 behind them);
- halves: their first bytes, then their second ones; nothing where all are 0; rests likewise.

Bytes are in Huffman's code (raw deflate) where that is less.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.downlink.disk.rest import Codes
from dare_agg.downlink.grid import Positions

Halves = NDArray[np.int16]
# First position, positions, how they are written, then bytes and form of each part.
_HEAD = struct.Struct("<QIB")
_PART = struct.Struct("<IB")
_PARTS = 4
_NEIGHBOURS, _GAPS, _BITS = 0, 1, 2
_PLAIN, _PACKED = 0, 1


@dataclass(frozen=True)
class OldValues:
    """What stood at ascending positions; ``high`` is None where all high halves were 0."""

    positions: Positions
    low: Halves
    rest: Codes
    high: Halves | None


def encode_old(old: OldValues) -> bytes:
    """Write a record."""
    way, places = _encode_places(old.positions)
    parts = [
        _packed(places) if way == _GAPS else (_PLAIN, places),
        _encode_halves(old.low),
        (_PLAIN, b"") if old.high is None else _encode_halves(old.high),
        _packed(old.rest.tobytes() if old.rest.any() else b""),
    ]
    head = _HEAD.pack(int(old.positions[0]), old.positions.size, way)
    heads = b"".join(_PART.pack(len(data), form) for form, data in parts)
    return head + heads + b"".join(data for _, data in parts)


def decode_old(data: bytes) -> OldValues:
    """Read a record that is whole."""
    first, count, way = _HEAD.unpack_from(data)
    parts, at = [], _HEAD.size + _PARTS * _PART.size
    for number in range(_PARTS):
        size, form = _PART.unpack_from(data, _HEAD.size + number * _PART.size)
        part = data[at : at + size]
        parts.append(zlib.decompress(part, -15) if form == _PACKED else part)
        at += size
    places, low, high, rest = parts
    return OldValues(
        _decode_places(first, count, way, places),
        _decode_halves(low, count),
        np.frombuffer(rest or bytes(count), np.uint8),
        _decode_halves(high, count) if high else None,
    )


def _encode_places(positions: Positions) -> tuple[int, bytes]:
    first, reach = positions[0], int(positions[-1] - positions[0]) + 1
    if reach == positions.size:
        return _NEIGHBOURS, b""
    if reach < 8 * positions.size:
        bits = np.zeros(reach, np.bool_)
        bits[positions - first] = True
        return _BITS, np.packbits(bits).tobytes()
    gaps = np.diff(positions)
    narrow, far = gaps.astype(np.uint8), gaps > 255
    narrow[far] = 0
    return _GAPS, narrow.tobytes() + gaps[far].astype("<u8").tobytes()


def _decode_places(first: int, count: int, way: int, data: bytes) -> Positions:
    if way == _BITS:
        return np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8))) + first
    gaps = np.ones(count - 1, np.int64)
    if way == _GAPS:
        gaps = np.frombuffer(data, np.uint8, count - 1).astype(np.int64)
        gaps[gaps == 0] = np.frombuffer(data, "<u8", -1, count - 1).astype(np.int64)
    return np.cumsum(np.concatenate(([first], gaps)))


def _encode_halves(halves: Halves) -> tuple[int, bytes]:
    moved = np.count_nonzero(halves)
    if not moved:
        return _PLAIN, b""
    columns = halves.astype("<i2").view(np.uint8).reshape(-1, 2).T
    # Wherever most have moved far, low halves are as good as random: not worth the time.
    if moved > 0.75 * halves.size and np.abs(columns[1].view(np.int8)).max() > 100:
        return _PLAIN, columns.tobytes()
    return _packed(columns.tobytes())


def _decode_halves(data: bytes, count: int) -> Halves:
    columns = np.frombuffer(data or bytes(2 * count), np.uint8).reshape(2, count)
    return np.ascontiguousarray(columns.T).view("<i2").reshape(count).astype(np.int16)


def _packed(data: bytes) -> tuple[int, bytes]:
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    packed = coder.compress(data) + coder.flush()
    return (_PACKED, packed) if len(packed) < len(data) else (_PLAIN, data)
