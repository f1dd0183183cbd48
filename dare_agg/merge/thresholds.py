"""Exact order statistics of \\|x\\| over a source, in bounded memory.

A sample brackets the answer; one pass counts what lies below the bracket and collects what
lies inside, which holds the exact k-th smallest. Where a bracket misses, or too many equal
values crowd it, a radix selection over the bits of \\|x\\| decides: non-negative float32
numbers sort like their bit patterns, so two passes over 16 bits each are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dare_agg.layout import FloatVector
from dare_agg.merge.sources import DeltaSource, take

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
    return kth_smallest_of_each([source], spans, [ranks], tile)[0]


def kth_smallest_of_each(
    sources: Sequence[DeltaSource],
    spans: Sequence[tuple[int, int]],
    ranks: Sequence[Sequence[int]],
    tile: int,
) -> NDArray[np.float32]:
    """As `kth_smallest` for (sources, spans); sources over one base share its tiles."""
    result = np.empty((len(sources), len(spans)), np.float32)
    step = max(tile, 1)
    for i, (lo, hi) in enumerate(spans):
        brackets: list[tuple[int, _Bracket]] = []
        for number, source in enumerate(sources):
            rank = ranks[number][i]
            if rank <= 0:
                result[number, i] = -1
            elif hi - lo <= _SMALL:
                whole = np.empty(hi - lo, np.float32)
                source.read(lo, hi, whole)
                result[number, i] = np.partition(np.abs(whole, out=whole), rank - 1)[rank - 1]
            else:
                brackets.append((number, _bracket(source, lo, hi, rank)))
        if brackets:
            chosen = [sources[number] for number, _ in brackets]
            for index, values in _magnitudes(chosen, lo, hi, step):
                brackets[index][1].add(values)
        for number, bracket in brackets:
            found = bracket.found()
            result[number, i] = (
                _radix(sources[number], lo, hi, bracket.rank, step) if found is None else found
            )
    return result


@dataclass
class _Bracket:
    """Bounds around the ``rank``-th smallest \\|x\\|, and what a pass finds inside them."""

    rank: int
    low: np.float32
    high: np.float32
    below: int = 0
    count: int = 0
    parts: list[FloatVector] = field(default_factory=list)

    def add(self, values: FloatVector) -> None:
        if self.count > _MAX_INSIDE and self.low != self.high:
            return
        least = values >= self.low
        self.below += values.size - int(np.count_nonzero(least))
        least &= values <= self.high
        inside = np.flatnonzero(least)
        self.count += inside.size
        if self.low != self.high:
            self.parts.append(values.take(inside))

    def found(self) -> float | None:
        """The order statistic, None where the bracket missed it or holds too many."""
        if self.low != self.high and self.count > _MAX_INSIDE:
            return None
        if not self.below < self.rank <= self.below + self.count:
            return None
        if self.low == self.high:
            return float(self.low)
        at = self.rank - self.below - 1
        return float(np.partition(np.concatenate(self.parts), at)[at])


def _bracket(source: DeltaSource, lo: int, hi: int, rank: int) -> _Bracket:
    """Bounds from a sample of runs of neighbours; a larger tensor affords a larger one."""
    blocks = min(_SAMPLE_BLOCKS, max(32, (hi - lo) // (64 * _SAMPLE_BLOCK)))
    starts = lo + (hi - lo - _SAMPLE_BLOCK) * np.arange(blocks, dtype=np.int64) // (blocks - 1)
    if hasattr(source, "take"):
        sample = take(source, (starts[:, None] + np.arange(_SAMPLE_BLOCK)).reshape(-1))
    else:
        sample = np.empty(blocks * _SAMPLE_BLOCK, np.float32)
        for piece, at in zip(sample.reshape(blocks, -1), starts.tolist(), strict=True):
            source.read(at, at + _SAMPLE_BLOCK, piece)
    sample = np.abs(sample)
    share = rank / (hi - lo)
    # Six standard deviations of a sample quantile, and something for unlike tensors.
    slack = 6 * (share * (1 - share) / sample.size) ** 0.5 + 0.002
    first = int((share - slack) * sample.size)
    last = int((share + slack) * sample.size) + 1
    ends = [i for i in (first, last) if 0 < i < sample.size]
    ordered = np.partition(sample, ends) if ends else sample
    low = ordered[first] if first > 0 else np.float32(0)
    high = ordered[last] if last < sample.size else np.float32(np.inf)
    return _Bracket(rank, low, high)


def _radix(source: DeltaSource, lo: int, hi: int, rank: int, step: int) -> float:
    upper_counts = np.zeros(_HALF, np.int64)
    for _, values in _magnitudes([source], lo, hi, step):
        bits = values.view(np.uint32)
        upper_counts += np.bincount(bits >> np.uint32(16), minlength=_HALF)
    cumulative = np.cumsum(upper_counts)
    upper = int(np.searchsorted(cumulative, rank))
    left = rank - (int(cumulative[upper - 1]) if upper else 0)
    lower_counts = np.zeros(_HALF, np.int64)
    for _, values in _magnitudes([source], lo, hi, step):
        bits = values.view(np.uint32)
        inside = bits[(bits >> np.uint32(16)) == upper] & np.uint32(0xFFFF)
        if inside.size:
            lower_counts += np.bincount(inside, minlength=_HALF)
    lower = int(np.searchsorted(np.cumsum(lower_counts), left))
    return float(np.array([upper << 16 | lower], np.uint32).view(np.float32)[0])


def _magnitudes(
    sources: Sequence[DeltaSource], lo: int, hi: int, step: int
) -> Iterator[tuple[int, FloatVector]]:
    """Yield ``(source number, \\|x\\|)`` of each tile of ``[lo, hi)``; valid until the next."""
    buffer = np.empty(min(step, hi - lo), np.float32)
    at = lo
    while at < hi:
        # Tiles end where those of the merge do, so cached tiles are found again.
        stop = min(hi, (at // step + 1) * step)
        piece = buffer[: stop - at]
        for number, source in enumerate(sources):
            source.read(at, stop, piece)
            bits = piece.view(np.uint32)
            np.bitwise_and(bits, _MAGNITUDE_BITS, out=bits)
            yield number, piece
        at = stop
