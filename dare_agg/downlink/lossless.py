"""**lossless**: the very grid steps, for exact sums of versions and runs that want no rounding.

Bytewise planes of zigzag counts in tiles of 2^20, each a u32 length and a zlib stream.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

from dare_agg.downlink.grid import TILE, Counts, Positions, VersionGrid, add_steps
from dare_agg.downlink.step_form import Settled, StepForm, StepHead
from dare_agg.errors import UpdateError
from dare_agg.vectors.layout import FloatVector


def encode_counts(counts: Counts) -> bytes:
    """Write whole steps exactly: planes of bytes, so that unmoved parameters cost nothing."""
    return b"".join(encode_tile(counts[lo : lo + TILE]) for lo in range(0, counts.size, TILE))


def encode_tile(counts: Counts) -> bytes:
    """As `encode_counts`, of one tile of at most `TILE` counts."""
    zigzag = ((counts << 1) ^ (counts >> 31)).astype("<u4")
    planes = np.ascontiguousarray(zigzag.view(np.uint8).reshape(-1, 4).T)
    packed = zlib.compress(planes.tobytes(), 6)
    return struct.pack("<I", len(packed)) + packed


def _encode(_: StepHead, change: FloatVector, grid: VersionGrid) -> tuple[bytes, int]:
    counts = np.zeros(grid.size, np.int32)
    for lo in range(0, grid.size, TILE):
        places = np.arange(lo, min(grid.size, lo + TILE), dtype=np.int64)
        add_steps(counts, places, grid.round_at(places, change[places]))
    return encode_counts(counts), 0


def _decode(
    _: StepHead, payload: bytes, grid: VersionGrid
) -> Iterator[tuple[Positions, Positions]]:
    at = 0
    for lo in range(0, grid.size, TILE):
        hi = min(grid.size, lo + TILE)
        if len(payload) - at < 4:
            raise UpdateError(
                f"lossless step ends at parameter {lo} of {grid.size}; ask for the version again",
                reason="truncated",
            )
        (length,) = struct.unpack_from("<I", payload, at)
        at += 4
        unpack = zlib.decompressobj()
        try:
            # One byte of room more than is due tells a bomb from a fitting tile.
            raw = unpack.decompress(payload[at : at + length], 4 * (hi - lo) + 1)
        except zlib.error as error:
            raise UpdateError(f"lossless step: {error}", reason="malformed") from error
        if len(raw) != 4 * (hi - lo) or not unpack.eof:
            raise UpdateError(
                f"lossless step: a tile of {len(raw)} bytes, {4 * (hi - lo)} are due",
                reason="malformed",
            )
        at += length
        planes = np.frombuffer(raw, np.uint8).reshape(4, hi - lo)
        zigzag = np.ascontiguousarray(planes.T).view("<u4").reshape(-1)
        # Most parameters did not move: nothing is made of them.
        moved = np.flatnonzero(zigzag)
        steps = zigzag[moved].astype(np.int64)
        moved += lo
        yield moved, (steps >> 1) ^ -(steps & 1)
    if at != len(payload):
        raise UpdateError(f"lossless step: {len(payload) - at} bytes too many", reason="trailing")


class _Writer:
    """Every tile is settled as soon as it came."""

    count = 0

    def __init__(self, grid: VersionGrid) -> None:
        self._grid, self._at = grid, 0
        self._parts: list[bytes] = []
        self._next = np.empty(0, np.int64)

    def places(self) -> Positions:
        lo, self._at = self._at, min(self._grid.size, self._at + TILE)
        self._next = np.arange(lo, self._at, dtype=np.int64)
        return self._next

    def add(self, change: FloatVector) -> Iterator[Settled]:
        steps = self._grid.round_at(self._next, change)
        counts = np.zeros(steps.size, np.int32)
        add_steps(counts, slice(None), steps)
        self._parts.append(encode_tile(counts))
        yield self._next, change, steps

    def finish(self) -> Iterator[Settled]:
        yield from ()

    def payload(self) -> bytes:
        return b"".join(self._parts)


LOSSLESS = StepForm("lossless", 3, _encode, _decode, lambda head, grid: _Writer(grid))
