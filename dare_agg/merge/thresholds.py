"""Exact order statistics of \\|x\\| over a source, in bounded memory.

A sample brackets the answer; one pass counts what lies below the bracket and collects what
lies inside, which holds the exact k-th smallest. Where a bracket misses, or too many equal
values crowd it, a radix selection over the bits of \\|x\\| decides: non-negative float32
numbers sort like their bit patterns, so two passes over 16 bits each are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dare_agg.layout import FloatVector
from dare_agg.merge.sources import DeltaSource

_MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)
_HALF = 1 << 16
_SMALL = 1 << 16
_SAMPLE_BLOCKS = 512
_SAMPLE_BLOCK = 128
_MAX_INSIDE = 1 << 22


def kth_smallest(
    source: DeltaSource, spans: Sequence[tuple[int, int]], ranks: Sequence[int], tile: int
) -> FloatVector:
    """Return, for each span, the ``rank``-th smallest \\|x\\| (1 = the smallest).

    Rank 0 gives −1, a bound below every \\|x\\|.
    """
    result = np.empty(len(spans), np.float32)
    step = max(tile, 1)
    for i, ((lo, hi), rank) in enumerate(zip(spans, ranks, strict=True)):
        if rank <= 0:
            result[i] = -1
        elif hi - lo <= _SMALL:
            whole = np.empty(hi - lo, np.float32)
            source.read(lo, hi, whole)
            result[i] = np.partition(np.abs(whole, out=whole), rank - 1)[rank - 1]
        else:
            found = _bracketed(source, lo, hi, rank, step)
            result[i] = _radix(source, lo, hi, rank, step) if found is None else found
    return result


def _bracketed(source: DeltaSource, lo: int, hi: int, rank: int, step: int) -> float | None:
    sample = np.empty(_SAMPLE_BLOCKS * _SAMPLE_BLOCK, np.float32)
    for number in range(_SAMPLE_BLOCKS):
        at = lo + (hi - lo - _SAMPLE_BLOCK) * number // (_SAMPLE_BLOCKS - 1)
        source.read(at, at + _SAMPLE_BLOCK, sample[number * _SAMPLE_BLOCK :][:_SAMPLE_BLOCK])
    np.abs(sample, out=sample)
    sample.sort()
    share = rank / (hi - lo)
    # Six standard deviations of a sample quantile, and something for unlike tensors.
    slack = 6 * (share * (1 - share) / sample.size) ** 0.5 + 0.002
    first = int((share - slack) * sample.size)
    last = int((share + slack) * sample.size) + 1
    low = sample[first] if first > 0 else np.float32(0)
    high = sample[last] if last < sample.size else np.float32(np.inf)
    below, count, parts = 0, 0, []
    for values in _magnitudes(source, lo, hi, step):
        least = values >= low
        below += values.size - int(np.count_nonzero(least))
        least &= values <= high
        inside = values.take(np.flatnonzero(least))
        if low == high:
            count += inside.size
            continue
        parts.append(inside)
        count += inside.size
        if count > _MAX_INSIDE:
            return None
    if not below < rank <= below + count:
        return None
    if low == high:
        return float(low)
    return float(np.partition(np.concatenate(parts), rank - below - 1)[rank - below - 1])


def _radix(source: DeltaSource, lo: int, hi: int, rank: int, step: int) -> float:
    upper_counts = np.zeros(_HALF, np.int64)
    for values in _magnitudes(source, lo, hi, step):
        bits = values.view(np.uint32)
        upper_counts += np.bincount(bits >> np.uint32(16), minlength=_HALF)
    cumulative = np.cumsum(upper_counts)
    upper = int(np.searchsorted(cumulative, rank))
    left = rank - (int(cumulative[upper - 1]) if upper else 0)
    lower_counts = np.zeros(_HALF, np.int64)
    for values in _magnitudes(source, lo, hi, step):
        bits = values.view(np.uint32)
        inside = bits[(bits >> np.uint32(16)) == upper] & np.uint32(0xFFFF)
        if inside.size:
            lower_counts += np.bincount(inside, minlength=_HALF)
    lower = int(np.searchsorted(np.cumsum(lower_counts), left))
    return float(np.array([upper << 16 | lower], np.uint32).view(np.float32)[0])


def _magnitudes(source: DeltaSource, lo: int, hi: int, step: int) -> Iterator[FloatVector]:
    """Yield \\|x\\| of each tile of ``[lo, hi)``; valid until the next one."""
    buffer = np.empty(min(step, hi - lo), np.float32)
    at = lo
    while at < hi:
        # Tiles end where those of the merge do, so cached tiles are found again.
        stop = min(hi, (at // step + 1) * step)
        piece = buffer[: stop - at]
        source.read(at, stop, piece)
        bits = piece.view(np.uint32)
        np.bitwise_and(bits, _MAGNITUDE_BITS, out=bits)
        yield piece
        at = stop
