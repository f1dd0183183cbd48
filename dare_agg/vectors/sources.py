"""Where deltas come from: anything that can be read tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import local
from typing import Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dare_agg.vectors.layout import FloatVector

Positions = NDArray[np.int64]
# DARE is safe while almost all |delta| stay below this (arXiv 2311.03099, section 4.4).
SAFE_DELTA = 0.005


@runtime_checkable
class DeltaSource(Protocol):
    """A delta of ``size`` elements, readable in any part."""

    @property
    def size(self) -> int:
        """Number of elements."""

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` (hi − lo elements) with ``delta[lo:hi]``."""


@runtime_checkable
class SparseSource(DeltaSource, Protocol):
    """A delta that is zero but for a few elements, which it can list."""

    @property
    def survivors(self) -> int:
        """Number of elements it can list."""

    def sparse(self, lo: int, hi: int) -> Iterator[tuple[Positions, FloatVector]]:
        """Yield ``(positions, values)`` of the survivors in ``[lo, hi)``, ascending."""


@dataclass(frozen=True)
class ArraySource:
    """A delta that is already in memory."""

    delta: FloatVector

    @property
    def size(self) -> int:
        return self.delta.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        out[:] = self.delta[lo:hi]

    def take(self, positions: Positions) -> FloatVector:
        """Return the delta's elements at ``positions``."""
        return self.delta.take(positions)


@dataclass(frozen=True)
class CachedSource:
    """A source whose last tile is kept for each thread: the base, read by every model."""

    source: DeltaSource
    _tiles: local = field(default_factory=local, init=False, repr=False, compare=False)

    @property
    def size(self) -> int:
        return self.source.size

    def tile(self, lo: int, hi: int) -> FloatVector:
        """Return elements ``lo`` to ``hi``; valid until another tile is asked for."""
        tiles = self._tiles
        if getattr(tiles, "range", None) != (lo, hi):
            if getattr(tiles, "buffer", np.empty(0)).size < hi - lo:
                tiles.buffer = np.empty(hi - lo, np.float32)
            tiles.range = None
            self.source.read(lo, hi, tiles.buffer[: hi - lo])
            tiles.range = (lo, hi)
        return tiles.buffer[: hi - lo]

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        out[:] = self.tile(lo, hi)

    def take(self, positions: Positions) -> FloatVector:
        """Return the elements at ``positions`` (ascending), from the kept tile where it can."""
        known = getattr(self._tiles, "range", None)
        if known and positions.size and known[0] <= positions[0] and positions[-1] < known[1]:
            return self._tiles.buffer.take(positions - known[0])
        return take(self.source, positions)


@dataclass(frozen=True)
class DifferenceSource:
    """tuned − base, where both are sources (mapped checkpoints)."""

    base: CachedSource
    tuned: DeltaSource

    @property
    def size(self) -> int:
        return self.tuned.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        self.tuned.read(lo, hi, out)
        np.subtract(out, self.base.tile(lo, hi), out=out)

    def take(self, positions: Positions) -> FloatVector:
        """Return the difference at ``positions`` (ascending); nothing else is read."""
        picked = take(self.tuned, positions)
        picked -= self.base.take(positions)
        return picked


@dataclass(frozen=True)
class SumSource:
    """model + delta, where both are sources (a mapped checkpoint and an adapter)."""

    model: DeltaSource
    delta: DeltaSource

    @property
    def size(self) -> int:
        return self.model.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        self.model.read(lo, hi, out)
        added = np.empty(hi - lo, np.float32)
        self.delta.read(lo, hi, added)
        out += added


def survivors_of(source: DeltaSource) -> int:
    """How many elements a source lists; all of them where it lists none apart."""
    return getattr(source, "survivors", source.size)


def listed(source: DeltaSource, lo: int, hi: int) -> Iterator[tuple[Positions, FloatVector]]:
    """Survivors of a source that is known to list them: checking each tile would cost time."""
    return cast(SparseSource, source).sparse(lo, hi)


def take(source: DeltaSource, positions: Positions) -> FloatVector:
    """Return a source's elements at ascending positions."""
    picker = getattr(source, "take", None)
    if picker is not None:
        return picker(positions)
    if not positions.size:
        return np.empty(0, np.float32)
    parts = []
    step = 1 << 16
    for lo in range(int(positions[0]), int(positions[-1]) + 1, step):
        hi = min(lo + step, int(positions[-1]) + 1)
        first, last = np.searchsorted(positions, (lo, hi))
        if last > first:
            tile = np.empty(hi - lo, np.float32)
            source.read(lo, hi, tile)
            parts.append(tile.take(positions[first:last] - lo))
    return np.concatenate(parts)


def array_source(delta: FloatVector) -> ArraySource:
    """Wrap a flat float32 delta."""
    return ArraySource(np.ascontiguousarray(delta, np.float32))
