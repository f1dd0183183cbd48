"""The grid that versions of the global model lie on.

Version v of a tensor t is ``W_v = float32(W_0 + 2^(−e_t)·D_v)``: the public base plus an
int32 count of steps of a power of two. Integers add in any order, so every path to a version
gives the same counts, and the same counts give the same bits.

The step 2^(−e_t) is one unit in the last place of the tensor's largest base value: with
2^(x−1) ≤ max|W_0| < 2^x, e_t = 24 − x, at least for max|W_0| = 2^(−6), so that tensors that
start at zero can move. int32 then reaches 128·2^x on either side. Of integers, 1/4096 each in the
vector, a step is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import StateError
from dare_agg.vectors.forms import INTEGERS_IN, integer_bounds
from dare_agg.vectors.layout import FloatVector, Layout, check_finite
from dare_agg.vectors.tiled import AnyVector

Counts = NDArray[np.int32]
Positions = NDArray[np.int64]
Factors = NDArray[np.float64] | np.float64

TILE = 1 << 20
SMALLEST_EXPONENT = -5  # of max|W_0| < 2^x
_OF_INTEGERS = INTEGERS_IN.bit_length() - 1
LIMIT = (1 << 31) - 1


@dataclass(frozen=True)
class VersionGrid:
    """The steps of one group of tensors; make one with `grid_of`.

    ``exponents`` holds e_t per tensor of the layout. ``halves`` are the places of float16
    tensors, whose versions are rounded to what they can hold; ``bounds`` the least and largest
    value of those that are integers, by place.
    """

    layout: Layout
    exponents: tuple[int, ...]
    halves: tuple[int, ...] = ()
    bounds: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of parameters on the grid."""
        return self.layout.size

    def round_at(self, positions: Positions, values: FloatVector) -> Positions:
        """Return ``values`` in whole steps (nearest, ties to even) at ascending positions."""
        scaled = values.astype(np.float64)
        scaled *= self.factors(positions)
        return np.rint(scaled, out=scaled).astype(np.int64)

    def value_at(self, positions: Positions, steps: Positions) -> FloatVector:
        """Return what so many steps are worth at ascending positions, as float32."""
        return (steps / self.factors(positions)).astype(np.float32)

    def values(self, base: FloatVector, counts: Counts) -> FloatVector:
        """Return the version with these counts, float32, shape (size,)."""
        vector = np.array(base[:])
        for lo in range(0, self.size, TILE):
            hi = min(self.size, lo + TILE)
            self.move(lo, vector[lo:hi], counts[lo:hi])
        check_finite(self.layout, vector, "on the version grid")
        return vector

    def move(self, lo: int, values: FloatVector, counts: NDArray[np.signedinteger]) -> None:
        """Turn base values from element ``lo`` on into those of the version, in place."""
        for entry, first, last in self.layout.pieces(lo, lo + values.size):
            place, at = self._places[entry.name], entry.offset - lo
            piece = values[at + first : at + last]
            step = np.float64(2.0 ** -self.exponents[place])
            # The product is exact, so each value is rounded the same way everywhere. Taken
            # from the base, not added: -0 - 0 is -0, so what never moved keeps its bits.
            exact = -(counts[at + first : at + last].astype(np.int64)) * step
            np.subtract(piece, exact, out=exact)
            piece[:] = exact
            if place in self.bounds:
                np.clip(piece, *self.bounds[place], out=piece)
            if place in self.halves:
                piece[:] = piece.astype(np.float16)

    def moved_at(
        self, positions: Positions, values: FloatVector, counts: NDArray[np.signedinteger]
    ) -> FloatVector:
        """As `move` for base values at ascending positions; returns new ones."""
        exact = values - -(counts.astype(np.int64)) / self.factors(positions)
        moved = exact.astype(np.float32)
        if self.bounds or self.halves:
            places = np.searchsorted(self._stops, positions, side="right")
            for place, (least, most) in self.bounds.items():
                here = places == place
                moved[here] = np.clip(moved[here], least, most)
            here = np.isin(places, self.halves)
            moved[here] = moved[here].astype(np.float16)
        return moved

    @cached_property
    def _places(self) -> dict[str, int]:
        return {entry.name: place for place, entry in enumerate(self.layout.entries)}

    @cached_property
    def _stops(self) -> NDArray[np.int64]:
        return np.array([entry.stop for entry in self.layout.entries], np.int64)

    @cached_property
    def _steps(self) -> NDArray[np.float64]:
        return np.array([2.0**e for e in self.exponents], np.float64)

    def factors(self, positions: Positions) -> Factors:
        """Steps in 1, 2^e_t, at ascending positions: one for all where they are of one tensor."""
        if not positions.size:
            return np.empty(0, np.float64)
        ends = positions[[0, -1]]
        first, last = np.searchsorted(self._stops, ends, side="right")
        if first == last:
            return self._steps[first]
        edges = np.searchsorted(positions, self._stops[first:last])
        counts = np.diff(edges, prepend=0, append=positions.size)
        return np.repeat(self._steps[first : last + 1], counts)


def grid_of(
    layout: Layout, base: AnyVector, dtypes: Mapping[str, np.dtype] | None = None
) -> VersionGrid:
    """Make the grid of a base; anyone who has the base makes the same one.

    Raises `NonFiniteError` when the base holds a NaN or an infinity.
    """
    exponents: list[int] = []
    for entry in layout.entries:
        largest = 0.0
        for lo in range(entry.offset, entry.stop, TILE):
            piece = base[lo : min(entry.stop, lo + TILE)]
            found = max(float(piece.max()), -float(piece.min()))
            if not math.isfinite(found):
                check_finite(layout, piece, "in the base", lo)
            largest = max(largest, found)
        above = int(np.frexp(largest)[1]) if largest else SMALLEST_EXPONENT
        exponents.append(24 - max(above, SMALLEST_EXPONENT))
    return grid_from(layout, exponents, dtypes)


def grid_from(
    layout: Layout, exponents: Sequence[int], dtypes: Mapping[str, np.dtype] | None = None
) -> VersionGrid:
    """Make the grid again whose ``exponents`` were kept: the base needs not be read."""
    known = dtypes or {}
    settled = list(exponents)
    halves: list[int] = []
    bounds: dict[int, tuple[float, float]] = {}
    for place, entry in enumerate(layout.entries):
        dtype = known.get(entry.name, np.dtype(np.float32))
        if dtype.kind in "iu":
            least, most = integer_bounds(dtype)
            bounds[place] = (least / INTEGERS_IN, most / INTEGERS_IN)
            settled[place] = _OF_INTEGERS
        elif dtype == np.float16:
            halves.append(place)
    return VersionGrid(layout, tuple(settled), tuple(halves), bounds)


def add_steps(counts: Counts, positions: Positions | slice, steps: Positions) -> None:
    """Add whole steps to ``counts`` in place; raises `StateError` beyond int32."""
    moved = counts[positions] + steps
    if moved.size and (moved.max() > LIMIT or moved.min() < -LIMIT):
        raise StateError(
            f"a parameter moved {int(np.abs(moved).max())} grid steps from the base, at most "
            f"{LIMIT} fit; start a new run from the last checkpoint, or lower the learning rate"
        )
    counts[positions] = moved
