"""What an adapter does to one tensor: steps on rows of it, each made from small factors.

A tensor of shape (a, b, …) is worked on as a matrix of ``rows`` × ``width``, row block by row
block. Steps that only add know their delta without the base; others take the base's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Rows = Callable[[int, int], Matrix]


class Step(Protocol):
    """A change of rows."""

    @property
    def adds(self) -> bool:
        """Whether it adds the same to whatever the rows hold."""

    def apply(self, values: Matrix, first: int, last: int) -> None:
        """Change ``values``, the rows ``first`` to ``last`` as the steps before left them."""


def delta(steps: Sequence[Step], base: Rows, first: int, last: int, width: int) -> Matrix:
    """The delta of rows ``first`` to ``last``: what the steps make of the base, less the base."""
    if all(step.adds for step in steps):
        values = np.zeros((last - first, width), np.float32)
        for step in steps:
            step.apply(values, first, last)
        return values
    before = base(first, last)
    values = before.copy()
    for step in steps:
        step.apply(values, first, last)
    values -= before
    return values


@dataclass(frozen=True)
class Product:
    """Adds L·R; of stacked matrices (L of shape (groups, rows, r)) each its own."""

    left: Matrix
    right: Matrix
    adds: bool = True

    def apply(self, values: Matrix, first: int, last: int) -> None:
        each = self.left.shape[1]
        for group in range(first // each, -(-last // each)):
            lo, hi = max(first, group * each), min(last, (group + 1) * each)
            part = self.left[group, lo - group * each : hi - group * each] @ self.right[group]
            values[lo - first : hi - first] += part


@dataclass(frozen=True)
class Addend:
    """Adds a vector of one value a row."""

    vector: NDArray[np.float32]
    adds: bool = True

    def apply(self, values: Matrix, first: int, last: int) -> None:
        values += self.vector[first:last, None]


@dataclass(frozen=True)
class Within:
    """Adds to the ``count`` rows from ``at`` on alone."""

    step: Product
    at: int
    count: int
    adds: bool = True

    def apply(self, values: Matrix, first: int, last: int) -> None:
        lo, hi = max(first, self.at), min(last, self.at + self.count)
        if lo < hi:
            self.step.apply(values[lo - first : hi - first], lo - self.at, hi - self.at)


@dataclass(frozen=True)
class Whole:
    """Puts other rows in the place of the base's."""

    rows: Rows
    adds: bool = False

    def apply(self, values: Matrix, first: int, last: int) -> None:
        values[:] = self.rows(first, last)


@dataclass(frozen=True)
class Replaced:
    """Puts single rows, at ascending ``positions``, in the place of the base's."""

    positions: NDArray[np.int64]
    rows: Matrix
    adds: bool = False

    def apply(self, values: Matrix, first: int, last: int) -> None:
        lo, hi = np.searchsorted(self.positions, (first, last))
        values[self.positions[lo:hi] - first] = self.rows[lo:hi]


@dataclass(frozen=True)
class Normed:
    """Gives each output its own length, the magnitude (DoRA, arXiv 2402.09353).

    ``norms`` are the lengths of all columns where the outputs are columns; rows are measured
    as they come.
    """

    magnitude: NDArray[np.float32]
    norms: NDArray[np.float32] | None = None
    adds: bool = False

    def apply(self, values: Matrix, first: int, last: int) -> None:
        if self.norms is not None:
            values *= self.magnitude / self.norms
            return
        norms = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64))
        values *= (self.magnitude[first:last] / norms.astype(np.float32))[:, None]


def column_norms(
    steps: Sequence[Step], base: Rows, rows: int, width: int, block: int
) -> NDArray[np.float32]:
    """Euclidean lengths of the columns of what the steps make of the base."""
    squares = np.zeros(width, np.float64)
    for first in range(0, rows, block):
        values = base(first, min(rows, first + block)).copy()
        for step in steps:
            step.apply(values, first, min(rows, first + block))
        squares += np.einsum("ij,ij->j", values, values, dtype=np.float64)
    return np.sqrt(squares).astype(np.float32)
