"""Exactly as many entries of each span as a count asks, by the rank of their magnitudes.

Deltas of bfloat16 models have few different magnitudes, so a threshold alone keeps too many. Of
equal entries the first in the tensor counts as the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.merge.task import FIXED_BLOCK, Span, cut, span_starts
from dare_agg.merge.thresholds import kth_smallest
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource


@dataclass(frozen=True)
class Selection:
    """Which entries of each span stay: \\|x\\| in [low, high], of those equal to ``low`` the ones
    before place ``until``, of those equal to ``high`` the ones from place ``since`` on."""

    spans: Sequence[Span]
    low: FloatVector
    until: NDArray[np.int64]
    high: FloatVector
    since: NDArray[np.int64]

    def keeps(self, values: FloatVector, lo: int) -> NDArray[np.bool_]:
        """Which of the values that stand from ``lo`` on stay."""
        hi = lo + values.size
        kept = np.empty(values.size, np.bool_)
        for span, a, b in cut(self.spans, span_starts(self.spans), lo, hi):
            size = np.abs(values[a - lo : b - lo])
            low, high = self.low[span], self.high[span]
            stays = (size >= low) & (size <= high)
            if a < self.since[span]:
                early = size[: self.since[span] - a] == high
                stays[: early.size] &= ~early
            if b > self.until[span]:
                late = size[max(0, self.until[span] - a) :] == low
                stays[b - a - late.size :] &= ~late
            kept[a - lo : b - lo] = stays
        return kept


@dataclass(frozen=True)
class SelectedSource:
    """A delta of which a `Selection` stays."""

    source: DeltaSource
    selection: Selection

    @property
    def size(self) -> int:
        return self.source.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        self.source.read(lo, hi, out)
        out *= self.selection.keeps(out, lo)


def select(
    source: DeltaSource, spans: Sequence[Span], ranks: Sequence[tuple[int, int]], tile: int
) -> Selection:
    """Select, in each span, the entries of ranks [first, stop) by ascending \\|x\\|."""
    sizes = [hi - lo for lo, hi in spans]
    low = kth_smallest(source, spans, [a + 1 if 0 < a < b else 0 for a, b in ranks], tile)
    tops = [b if a < b < n else 0 for (a, b), n in zip(ranks, sizes, strict=True)]
    high = kth_smallest(source, spans, tops, tile)
    until = np.array([hi for _, hi in spans], np.int64)
    since = np.array([lo for lo, _ in spans], np.int64)
    for i, (span, (first, stop)) in enumerate(zip(spans, ranks, strict=True)):
        if stop <= first:
            low[i] = np.inf
        elif first > 0:
            below, equal = _standing(source, span, low[i])
            # Ranks of equal entries fall with their places.
            until[i] = _place(source, span, low[i], below + equal - first)
        if first < stop < sizes[i]:
            below, equal = _standing(source, span, high[i])
            since[i] = _place(source, span, high[i], below + equal - stop)
        else:
            high[i] = np.inf
    return Selection(spans, low, until, high, since)


def _standing(source: DeltaSource, span: Span, limit: np.float32) -> tuple[int, int]:
    """How many \\|x\\| of a span are below a limit, and how many equal to it."""
    below = equal = 0
    for _, size in _magnitudes(source, span):
        below += int(np.count_nonzero(size < limit))
        equal += int(np.count_nonzero(size == limit))
    return below, equal


def _place(source: DeltaSource, span: Span, limit: np.float32, count: int) -> int:
    """The place behind the first ``count`` entries of a span with \\|x\\| equal to a limit."""
    if not count:
        return span[0]
    for lo, size in _magnitudes(source, span):
        found = np.flatnonzero(size == limit)
        if found.size >= count:
            return lo + int(found[count - 1]) + 1
        count -= found.size
    return span[1]


def _magnitudes(source: DeltaSource, span: Span) -> Iterator[tuple[int, FloatVector]]:
    buffer = np.empty(FIXED_BLOCK, np.float32)
    for lo in range(*span, FIXED_BLOCK):
        size = buffer[: min(span[1], lo + FIXED_BLOCK) - lo]
        source.read(lo, lo + size.size, size)
        yield lo, np.abs(size, out=size)
