"""Exact order statistics of \\|x\\| over a source, in bounded memory.

A sample brackets the answer; one pass counts what lies below the bracket and collects what
lies inside, which holds the exact k-th smallest. What is too much to keep is counted:
non-negative float32 numbers sort like their bit patterns, so a bracket of up to 2^20 patterns
needs no more than that many counters. A bracket that is wider becomes one of its parts, one
that missed becomes the whole range, and another pass decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import MergeError
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource, take

_MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)
_SMALL = 1 << 16
_SAMPLE_BLOCKS = (32, 512, 4096)
_SAMPLE_BLOCK = 128
# What a bracket keeps: values, then counts of runs of neighbouring bit patterns.
_HELD = 1 << 20
_BINS = 1 << 20
_INFINITY = 0x7F800000
# Sources that share a pass, so that brackets take the same room for any number of them.
_TOGETHER = 4


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
    for first in range(0, len(sources), _TOGETHER):
        some = range(first, min(len(sources), first + _TOGETHER))
        for i, (lo, hi) in enumerate(spans):
            brackets: dict[int, _Bracket] = {}
            for number in some:
                rank = ranks[number][i]
                if rank <= 0:
                    result[number, i] = -1
                elif hi - lo <= _SMALL:
                    whole = np.empty(hi - lo, np.float32)
                    sources[number].read(lo, hi, whole)
                    result[number, i] = _select(np.abs(whole, out=whole), rank - 1)
                else:
                    brackets[number] = _bracket(sources[number], lo, hi, rank)
            while brackets:
                chosen = list(brackets)
                parts = _magnitudes([sources[n] for n in chosen], lo, hi, max(tile, 1))
                for index, values in parts:
                    brackets[chosen[index]].add(values)
                for number in chosen:
                    found = brackets[number].found()
                    if found is not None:
                        result[number, i] = found
                        del brackets[number]
    return result


def _select(values: FloatVector, at: int) -> float:
    """The element number ``at`` (from 0) in ascending order of non-negative values.

    Counts runs of bit patterns: partitioning is slow where many values are equal.
    """
    while True:
        bits = values.view(np.uint32)
        low = bits.min()
        shift = np.uint32(max(0, int(bits.max() - low).bit_length() - 12))
        runs = (bits - low) >> shift
        reached = np.cumsum(np.bincount(runs))
        run = int(np.searchsorted(reached, at, side="right"))
        if not shift:
            return float(np.array([low + np.uint32(run)], np.uint32).view(np.float32)[0])
        at -= int(reached[run - 1]) if run else 0
        values = values[runs == run]


class _Bracket:
    """Bounds around the ``rank``-th smallest \\|x\\|, and what a pass finds inside them."""

    def __init__(self, rank: int, low: float, high: float) -> None:
        self.rank = rank
        bits = np.array([low, high], np.float32).view(np.uint32)
        self._begin(int(bits[0]), int(bits[1]))

    def _begin(self, low: int, high: int) -> None:
        self._bits = low, high
        self._low, self._high = np.array([low, high], np.uint32).view(np.float32)
        self._below = self._inside = self._held = 0
        self._parts: list[FloatVector] = []
        self._shift = np.uint32(max(0, (high - low).bit_length() - _BINS.bit_length() + 1))
        self._counts: NDArray[np.uint32] | None = None

    def add(self, values: FloatVector) -> None:
        least = values >= self._low
        self._below += values.size - int(np.count_nonzero(least))
        least &= values <= self._high
        inside = np.flatnonzero(least)
        self._inside += inside.size
        if self._low == self._high:
            return
        self._parts.append(values.take(inside))
        self._held += inside.size
        if self._held > _HELD:
            self._count()

    def _count(self) -> None:
        low, high = self._bits
        runs = (np.concatenate(self._parts).view(np.uint32) - np.uint32(low)) >> self._shift
        bins = ((high - low) >> int(self._shift)) + 1
        counts = np.bincount(runs, minlength=bins).astype(np.uint32)
        self._counts = counts if self._counts is None else self._counts + counts
        self._parts, self._held = [], 0

    def found(self) -> float | None:
        """The order statistic, or None after having changed the bracket for another pass."""
        low, high = self._bits
        at = self.rank - self._below - 1
        if not 0 <= at < self._inside:
            if (low, high) == (0, _INFINITY):
                raise MergeError("a delta is not finite; it has no order to trim by")
            self._begin(0, _INFINITY)
            return None
        if low == high:
            return float(self._low)
        if self._counts is None:
            return _select(np.concatenate(self._parts), at)
        if self._held:
            self._count()
        run = int(np.searchsorted(np.cumsum(self._counts, dtype=np.int64), at, side="right"))
        first = low + (run << int(self._shift))
        self._begin(first, min(high, first + (1 << int(self._shift)) - 1))
        return float(self._low) if self._bits[0] == self._bits[1] else None


def _bracket(source: DeltaSource, lo: int, hi: int, rank: int) -> _Bracket:
    """Bounds from a sample of runs of neighbours; a larger tensor affords a larger one."""
    least, usual, most = _SAMPLE_BLOCKS
    blocks = max(min(usual, (hi - lo) // (64 * _SAMPLE_BLOCK)), (hi - lo) // (512 * _SAMPLE_BLOCK))
    blocks = min(most, max(least, blocks))
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
    return _Bracket(rank, float(low), float(high))


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
