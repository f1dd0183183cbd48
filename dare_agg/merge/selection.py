"""Exactly as many entries of each span as a count asks, by the rank of their magnitudes.

Deltas of bfloat16 models have few different magnitudes, so a threshold alone keeps too many. Equal
entries are ranked by their places.
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

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """Which entries of each span stay: \\|x\\| in [low, high], of those equal to ``low`` the ones
    at ``low_places`` [first, stop), and so for ``high``; places are (spans, 2)."""

    spans: Sequence[Span]
    low: FloatVector
    low_places: Places
    high: FloatVector
    high_places: Places

    def keeps(self, values: FloatVector, lo: int) -> NDArray[np.bool_]:
        """Which of the values that stand from ``lo`` on stay."""
        kept = np.empty(values.size, np.bool_)
        for span, a, b in cut(self.spans, span_starts(self.spans), lo, lo + values.size):
            size = np.abs(values[a - lo : b - lo])
            stays = (size >= self.low[span]) & (size <= self.high[span])
            for limit, places in ((self.low, self.low_places), (self.high, self.high_places)):
                first, stop = places[span]
                for outside in (slice(0, max(0, first - a)), slice(max(0, stop - a), None)):
                    stays[outside] &= size[outside] != limit[span]
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
    source: DeltaSource,
    spans: Sequence[Span],
    ranks: Sequence[tuple[int, int]],
    tile: int,
    *,
    later_is_larger: bool = False,
) -> Selection:
    """Select, in each span, the entries of ranks [first, stop) by ascending \\|x\\|.

    Of equal entries the first in the tensor counts as the largest, or the last.
    """
    sizes = [hi - lo for lo, hi in spans]
    low = kth_smallest(source, spans, [a + 1 if 0 < a < b else 0 for a, b in ranks], tile)
    tops = [b if a < b < n else 0 for (a, b), n in zip(ranks, sizes, strict=True)]
    high = kth_smallest(source, spans, tops, tile)
    low_places = np.array(spans, np.int64).reshape(-1, 2)
    high_places = low_places.copy()
    for i, (span, (first, stop)) in enumerate(zip(spans, ranks, strict=True)):
        if stop <= first:
            low[i] = np.inf
        elif first > 0:
            below, equal = _standing(source, span, low[i])
            out = first - below
            if later_is_larger:
                low_places[i, 0] = _place(source, span, low[i], out)
            else:
                low_places[i, 1] = _place(source, span, low[i], equal - out)
        if first < stop < sizes[i]:
            below, equal = _standing(source, span, high[i])
            out = below + equal - stop
            if later_is_larger:
                high_places[i, 1] = _place(source, span, high[i], equal - out)
            else:
                high_places[i, 0] = _place(source, span, high[i], out)
        else:
            high[i] = np.inf
    return Selection(spans, low, low_places, high, high_places)


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
