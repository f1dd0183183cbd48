"""A delta that is 0 but on a mask: its survivors' values, read in any part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dare_agg.codec.mask import Mask
from dare_agg.errors import ConfigError
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import Positions


@dataclass(frozen=True)
class MaskedSource:
    """The survivors' ``values``, rescaled where they are read, as `Mask.scatter` does for all.

    Raises `ConfigError` unless there is a value for each survivor.
    """

    mask: Mask
    values: FloatVector

    def __post_init__(self) -> None:
        if self.values.shape != (self.survivors,):
            raise ConfigError(
                f"{self.values.shape} values; this mask has {self.survivors} survivors"
            )

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.mask.size

    @property
    def survivors(self) -> int:
        """Number of elements other than 0, at most."""
        return self.mask.survivors

    def sparse(self, lo: int, hi: int) -> Iterator[tuple[Positions, FloatVector]]:
        """As `dare_agg.vectors.sources.SparseSource`; positions may be reused by the next step."""
        for first, positions, scale in self.mask.within(lo, hi):
            yield positions, self.values[first : first + positions.size] * scale

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with elements ``lo`` to ``hi``."""
        out[:] = 0
        for positions, values in self.sparse(lo, hi):
            out[positions - lo] = values

    def norm(self) -> float:
        """The delta's ‖·‖, in float64."""
        squares = (
            float(np.sum(np.square(values, dtype=np.float64)))
            for _, values in self.sparse(0, self.size)
        )
        return math.sqrt(math.fsum(squares))
