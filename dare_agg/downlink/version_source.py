"""A version as it lies on disk: the base and whole grid steps, put together where it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dare_agg.downlink.grid import Positions, VersionGrid
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource, take

_TILE = 1 << 18


@dataclass(frozen=True)
class VersionSource:
    """base + counts on the grid (a `DeltaSource`); neither is held in memory.

    ``counts`` are indexed like an int32 vector. ``check`` is called when counts were read and
    before they are used, and raises where they have moved on to another version meanwhile.
    """

    base: DeltaSource
    grid: VersionGrid
    counts: Any
    check: Callable[[], None] = lambda: None

    @property
    def size(self) -> int:
        return self.grid.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with the version's elements ``lo`` to ``hi``."""
        for first in range(lo, hi, _TILE):
            last = min(hi, first + _TILE)
            piece = out[first - lo : last - lo]
            self.base.read(first, last, piece)
            counts = self.counts[first:last]
            self.check()
            self.grid.move(first, piece, counts)

    def take(self, positions: Positions) -> FloatVector:
        """Return the version's elements at ascending positions."""
        if not positions.size:
            return np.empty(0, np.float32)
        counts = self.counts[positions]
        self.check()
        return self.grid.moved_at(positions, take(self.base, positions), counts)
