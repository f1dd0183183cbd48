"""Exact order statistics of \\|x\\| over a source, in bounded memory.

Non-negative float32 numbers sort like their bit patterns, so a radix selection over the
upper and then the lower 16 bits of \\|x\\| finds the exact k-th smallest in two passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dare_agg.layout import FloatVector
from dare_agg.merge.sources import DeltaSource

_MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)
_HALF = 1 << 16


def kth_smallest(
    source: DeltaSource, spans: Sequence[tuple[int, int]], ranks: Sequence[int], tile: int
) -> FloatVector:
    """Return, for each span, the ``rank``-th smallest \\|x\\| (1 = the smallest).

    Rank 0 gives −1, so that "≤ threshold" selects nothing.
    """
    result = np.empty(len(spans), np.float32)
    buffer = np.empty(tile, np.float32)
    for i, ((lo, hi), rank) in enumerate(zip(spans, ranks, strict=True)):
        if rank <= 0:
            result[i] = -1
            continue
        upper_counts = np.zeros(_HALF, np.int64)
        for bits in _tiles(source, lo, hi, buffer):
            upper_counts += np.bincount(bits >> np.uint32(16), minlength=_HALF)
        cumulative = np.cumsum(upper_counts)
        upper = int(np.searchsorted(cumulative, rank))
        left = rank - (int(cumulative[upper - 1]) if upper else 0)
        lower_counts = np.zeros(_HALF, np.int64)
        for bits in _tiles(source, lo, hi, buffer):
            inside = bits[(bits >> np.uint32(16)) == upper] & np.uint32(0xFFFF)
            if inside.size:
                lower_counts += np.bincount(inside, minlength=_HALF)
        lower = int(np.searchsorted(np.cumsum(lower_counts), left))
        result[i] = np.array([upper << 16 | lower], np.uint32).view(np.float32)[0]
    return result


def _tiles(source: DeltaSource, lo: int, hi: int, buffer: FloatVector):  # type: ignore[no-untyped-def]
    for start in range(lo, hi, buffer.size):
        piece = buffer[: min(hi, start + buffer.size) - start]
        source.read(start, start + piece.size, piece)
        yield piece.view(np.uint32) & _MAGNITUDE_BITS
