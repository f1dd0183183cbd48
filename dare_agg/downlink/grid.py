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

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import StateError
from dare_agg.vectors.forms import INTEGERS_IN, integer_bounds
from dare_agg.vectors.layout import FloatVector, Layout, check_finite

Counts = NDArray[np.int32]
Positions = NDArray[np.int64]

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
        scaled *= self._factors(positions)
        return np.rint(scaled, out=scaled).astype(np.int64)

    def value_at(self, positions: Positions, steps: Positions) -> FloatVector:
        """Return what so many steps are worth at ascending positions, as float32."""
        return (steps / self._factors(positions)).astype(np.float32)

    def values(self, base: FloatVector, counts: Counts) -> FloatVector:
        """Return the version with these counts, float32, shape (size,)."""
        vector = np.empty(self.size, np.float32)
        for place, entry in enumerate(self.layout.entries):
            step = np.float64(2.0 ** -self.exponents[place])
            for lo in range(entry.offset, entry.stop, TILE):
                hi = min(entry.stop, lo + TILE)
                # The product is exact, so each value is rounded the same way everywhere. Taken
                # from the base, not added: -0 - 0 is -0, so what never moved keeps its bits.
                exact = -counts[lo:hi] * step
                np.subtract(base[lo:hi], exact, out=exact)
                vector[lo:hi] = exact
                if place in self.bounds:
                    np.clip(vector[lo:hi], *self.bounds[place], out=vector[lo:hi])
                if place in self.halves:
                    vector[lo:hi] = vector[lo:hi].astype(np.float16)
        check_finite(self.layout, vector, "on the version grid")
        return vector

    def _factors(self, positions: Positions) -> NDArray[np.float64]:
        stops = np.array([entry.stop for entry in self.layout.entries], np.int64)
        steps = np.array([2.0**e for e in self.exponents], np.float64)
        return steps[np.searchsorted(stops, positions, side="right")]


def grid_of(
    layout: Layout, base: FloatVector, dtypes: Mapping[str, np.dtype] | None = None
) -> VersionGrid:
    """Make the grid of a base; anyone who has the base makes the same one.

    Raises `NonFiniteError` when the base holds a NaN or an infinity.
    """
    check_finite(layout, base, "in the base")
    known = dtypes or {}
    exponents: list[int] = []
    halves: list[int] = []
    bounds: dict[int, tuple[float, float]] = {}
    for place, entry in enumerate(layout.entries):
        dtype = known.get(entry.name, np.dtype(np.float32))
        if dtype.kind in "iu":
            least, most = integer_bounds(dtype)
            bounds[place] = (least / INTEGERS_IN, most / INTEGERS_IN)
            exponents.append(_OF_INTEGERS)
            continue
        piece = base[entry.offset : entry.stop]
        largest = max(float(piece.max()), -float(piece.min())) if entry.size else 0.0
        above = int(np.frexp(largest)[1]) if largest else SMALLEST_EXPONENT
        exponents.append(24 - max(above, SMALLEST_EXPONENT))
        if dtype == np.float16:
            halves.append(place)
    return VersionGrid(layout, tuple(exponents), tuple(halves), bounds)


def add_steps(counts: Counts, positions: Positions | slice, steps: Positions) -> None:
    """Add whole steps to ``counts`` in place; raises `StateError` beyond int32."""
    moved = counts[positions] + steps
    if moved.size and (moved.max() > LIMIT or moved.min() < -LIMIT):
        raise StateError(
            f"a parameter moved {int(np.abs(moved).max())} grid steps from the base, at most "
            f"{LIMIT} fit; start a new run from the last checkpoint, or lower the learning rate"
        )
    counts[positions] = moved
