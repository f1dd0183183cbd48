"""Where deltas come from: anything that can be read tile by tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from dare_agg.errors import LayoutError
from dare_agg.layout import FloatVector


@runtime_checkable
class DeltaSource(Protocol):
    """A delta of ``size`` elements, readable in any part."""

    @property
    def size(self) -> int: ...

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` (hi − lo elements) with ``delta[lo:hi]``."""


@dataclass(frozen=True)
class ArraySource:
    """A delta that is already in memory."""

    delta: FloatVector

    @property
    def size(self) -> int:
        return self.delta.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        out[:] = self.delta[lo:hi]


@dataclass(frozen=True)
class PairSource:
    """tuned − base, subtracted as it is read."""

    base: FloatVector
    tuned: FloatVector

    def __post_init__(self) -> None:
        if self.base.shape != self.tuned.shape:
            raise LayoutError(
                f"base has {self.base.size} parameters, tuned {self.tuned.size}; they must be equal"
            )

    @property
    def size(self) -> int:
        return self.base.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        np.subtract(self.tuned[lo:hi], self.base[lo:hi], out=out)


def array_source(delta: FloatVector) -> ArraySource:
    """Wrap a flat float32 delta."""
    return ArraySource(np.ascontiguousarray(delta, np.float32))


def pair_source(base: FloatVector, tuned: FloatVector) -> PairSource:
    """Wrap a base and a tuned model as their delta."""
    return PairSource(base, tuned)
