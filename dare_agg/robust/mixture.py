"""Vectors that are combinations of a round's deltas, known by their scalar products alone.

Bounds, neighbours, buckets, Krum, the geometric median and centered clipping all give combinations
of the deltas, and distances are all that they ask of them. So they work on n × n products, whatever
the size of the model, and the deltas are read once for these and once for the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dare_agg.robust.rows import Matrix, in_blocks

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Mixture:
    """m vectors made of n deltas: row i of ``parts`` (m, n) says how much of each delta is in it.

    ``products`` (m, m) are the scalar products of the vectors, ``weights`` (m,) what each counts
    for where weights count.
    """

    parts: Matrix
    products: Matrix
    weights: Numbers

    @property
    def count(self) -> int:
        """Number of vectors."""
        return len(self.parts)

    @property
    def norms(self) -> Numbers:
        """‖xᵢ‖."""
        return np.sqrt(np.maximum(np.diag(self.products), 0))

    def scaled(self, factors: Numbers) -> Mixture:
        """Each vector times its factor."""
        return replace(
            self,
            parts=self.parts * factors[:, None],
            products=self.products * factors[:, None] * factors[None, :],
        )

    def mixed(self, shares: Matrix) -> Mixture:
        """Σⱼ shares[i, j]·xⱼ for every row of ``shares``; all of them count alike."""
        return Mixture(
            times(shares, self.parts),
            times(times(shares, self.products), shares.T),
            np.ones(len(shares)),
        )

    def squared_distances(self) -> Matrix:
        """‖xᵢ − xⱼ‖² of all pairs."""
        squares = np.diag(self.products)
        return np.maximum(squares[:, None] + squares[None, :] - 2 * self.products, 0)

    def distances_to(self, shares: Numbers) -> Numbers:
        """‖xᵢ − Σⱼ sharesⱼ·xⱼ‖ of every vector."""
        along = times(self.products, shares[:, None])[:, 0]
        square = float(np.sum(along * shares))
        return np.sqrt(np.maximum(np.diag(self.products) - 2 * along + square, 0))


def mixture_of(products: Matrix, weights: Numbers) -> Mixture:
    """The deltas themselves, with these scalar products."""
    return Mixture(np.eye(len(products)), products, weights)


def combined(parts: Matrix, values: NDArray[np.float32]) -> Matrix:
    """``parts @ values`` in float64, added in the order of the deltas.

    Elementwise operations alone, so an element has the same bits wherever a tile is cut.
    """
    out = np.zeros((len(parts), values.shape[1]))
    for at in in_blocks(values.shape[1]):
        rows = values[:, at].astype(np.float64)
        term = np.empty(rows.shape[1])
        for mixed, shares in zip(out[:, at], parts, strict=True):
            for number in np.flatnonzero(shares):
                np.multiply(rows[number], shares[number], out=term)
                mixed += term
    return out


def times(a: Matrix, b: Matrix) -> Matrix:
    """``a @ b`` of small matrices, added in one order whatever BLAS there is."""
    out = np.zeros((len(a), b.shape[1]))
    for number in range(a.shape[1]):
        out += a[:, number, None] * b[number]
    return out
