"""A flat vector that lies elsewhere (a mapped checkpoint, a version on disk), read in parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import LayoutError
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource, take

TILE = 1 << 20


@dataclass(frozen=True)
class TiledVector:
    """A `DeltaSource` that is sliced like a float32 vector; each slice is read anew.

    It is never read as a whole: code that goes over a vector in slices takes either.
    """

    source: DeltaSource

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.source.size

    @property
    def shape(self) -> tuple[int, ...]:
        """As a vector's."""
        return (self.source.size,)

    def __getitem__(self, part: slice) -> FloatVector:
        lo, hi, step = part.indices(self.size)
        if step != 1:
            raise ValueError(f"slice with step {step}; a tiled vector is read in runs")
        out = np.empty(max(0, hi - lo), np.float32)
        if out.size:
            self.source.read(lo, hi, out)
        return out

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with the elements ``lo`` to ``hi``."""
        self.source.read(lo, hi, out)

    def take(self, positions: NDArray[np.int64]) -> FloatVector:
        """Return the elements at ascending positions."""
        return take(self.source, positions)


AnyVector = FloatVector | TiledVector


def tiles(vector: AnyVector, tile: int = TILE) -> Iterator[tuple[int, FloatVector]]:
    """Yield ``(first, elements)`` over the whole vector, in order."""
    for lo in range(0, vector.size, tile):
        yield lo, vector[lo : lo + tile]


def retiled(
    pieces: Iterable[tuple[int, FloatVector]], size: int, tile: int = TILE
) -> Iterator[tuple[int, FloatVector]]:
    """Cut ascending pieces of a whole vector into tiles; each is valid until the next.

    Raises `LayoutError` for pieces that do not follow each other, or not up to ``size``.
    """
    buffer = np.empty(min(tile, size), np.float32)
    at = 0
    for lo, piece in pieces:
        if lo != at:
            raise LayoutError(f"a piece begins at {lo}; {at} is the next element")
        if lo + piece.size > size:
            raise LayoutError(f"pieces of more than {size} elements")
        while piece.size:
            first = at // tile * tile
            whole = min(tile, size - first)
            taken = piece[: whole - (at - first)]
            at += taken.size
            piece = piece[taken.size :]
            if taken.size == whole:
                yield first, taken
                continue
            buffer[at - taken.size - first : at - first] = taken
            if at - first == whole:
                yield first, buffer[:whole]
    if at != size:
        raise LayoutError(f"pieces of {at} elements; {size} are due")
