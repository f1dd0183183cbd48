"""Noise that rounds share, for clients who cannot be sampled but come b rounds apart.

Round t's noise is y_t = ξ_t − Σ_{0<j<b} c_j·y_{t−j}, element by element over those rounds whose
mask keeps the element; ξ_t is fresh Gaussian noise, c_j = C(2j, j)/4ʲ the coefficients of
(1 − x)^(−1/2). A model is the sum of its rounds, and in that sum later noise takes part of the
earlier off again.

Why it is private. Let C be the lower triangular Toeplitz matrix of c_0 … c_{b−1}, and C_K its rows
and columns of the rounds K that keep an element. What is released of the element is x + C_K⁻¹ξ, as
good as C_K·x + ξ. A client adds to x in rounds at least b apart; columns of C_K that far
apart share no row, and none is longer than ‖c‖. Over all elements the client therefore moves C·x by
‖c‖·(its norm)·√(how often it came): fresh noise of deviation z·‖c‖·norm makes each time cost
what one Gaussian release of multiplier z costs. Being lower triangular it also holds where clients,
masks and what is trained follow from earlier releases.

Reference: Kairouz et al. 2021, arXiv 2103.00039 (DP-FTRL); Denisov et al. 2022, arXiv 2202.08312
(adaptive streams); Choquette-Choo et al. 2023, arXiv 2306.08153 (bands and participation); Kalinin
and Lampert 2024, arXiv 2405.13763 (this matrix).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.mask import Mask


@dataclass(frozen=True)
class Places:
    """Where the values of a round's vector stand: survivors of ``mask``, then ``dense`` values."""

    mask: Mask
    dense: int = 0

    @property
    def count(self) -> int:
        """How many values there are."""
        return self.mask.survivors + self.dense

    @property
    def room(self) -> int:
        """How many elements there are, kept or not."""
        return self.mask.size + self.dense

    def positions(self) -> NDArray[np.int64]:
        """The elements of the values, ascending."""
        dense = np.arange(self.mask.size, self.room)
        return np.concatenate([self.mask.indices(0, self.mask.size), dense])


@dataclass(frozen=True)
class Added:
    """The noise that a round added, in units of the fresh noise's deviation, and where."""

    positions: NDArray[np.int64]
    values: NDArray[np.float64]


def coefficients(apart: int) -> list[float]:
    """c_0 … c_{b−1} for clients who come ``apart`` = b rounds apart."""
    found = [1.0]
    for j in range(1, apart):
        found.append(found[-1] * (2 * j - 1) / (2 * j))
    return found


def length(apart: int) -> float:
    """‖c‖: by how much longer a client's vector is in what is noised."""
    return math.sqrt(math.fsum(c * c for c in coefficients(apart)))


def shared(fresh: NDArray[np.float64], places: Places, before: Sequence[Added]) -> Added:
    """A round's noise: ``fresh``, less what the rounds ``before`` it, the latest last, call for.

    ``before`` are the b − 1 latest, fewer where there were no more.
    """
    positions = places.positions()
    values = fresh.copy()
    weights = coefficients(len(before) + 1)
    room = max([places.room, *(int(old.positions[-1]) + 1 for old in before if old.values.size)])
    scratch = np.zeros(room)
    for weight, old in zip(weights[1:], reversed(before), strict=True):
        scratch[old.positions] = old.values
        values -= weight * scratch[positions]
        scratch[old.positions] = 0
    return Added(positions, values)
