"""Each client's momentum, kept on the server: the drop's noise averages out before the vote.

m ← beta·m + (1−beta)·x for the delta x that a client sent, and m/(1−betaᵗ) after t of its rounds is
what the rule is given (RoSDHB, arXiv 2508.17129; with Kingma and Ba's correction, so that the first
round counts in full). It is as long as the model: 4 bytes a parameter and client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dare_agg.errors import StateError
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource, listed

_TILE = 1 << 16


@dataclass(frozen=True)
class Momentum:
    """One client's: the vector, and of how many rounds it is made."""

    vector: FloatVector
    rounds: int

    def correction(self, beta: float) -> float:
        """What the vector is multiplied by: 1/(1−betaᵗ)."""
        return 1 / (1 - beta**self.rounds)


Momenta = Mapping[str, Momentum]


def moved(
    before: Momentum | None, source: DeltaSource, beta: float, factor: float = 1.0
) -> Momentum:
    """The client's momentum after ``factor`` times the delta it sent; ``before`` stays as it is.

    Raises `StateError` for a momentum of another size.
    """
    if before is None:
        before = Momentum(np.zeros(source.size, np.float32), 0)
    if before.vector.shape != (source.size,):
        raise StateError(
            f"a client's momentum has {before.vector.size} elements, its delta {source.size}; "
            "resume with the model the run was started with"
        )
    vector = before.vector * np.float32(beta)
    share = np.float32((1 - beta) * factor)
    for lo in range(0, source.size, _TILE):
        hi = min(lo + _TILE, source.size)
        if hasattr(source, "sparse"):
            for positions, values in listed(source, lo, hi):
                # Positions are unique.
                vector[positions] += values * share
        else:
            values = np.empty(hi - lo, np.float32)
            source.read(lo, hi, values)
            vector[lo:hi] += values * share
    return Momentum(vector, before.rounds + 1)
