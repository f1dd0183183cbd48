"""The merge by summed Gram matrices: what sketches give back, and the merged delta of it.

With the sums Y = Σ Gᵢ·S and Z = Σ τᵢ·Gᵢ·S, Σ Gᵢ = Y·(SᵀY)⁺·Yᵀ = Q·Λ·Qᵀ, exact where the columns
of S are more than the directions. The rows of Σ τᵢ·Gᵢ lie in the span of Q, so the merged delta
of a Linear is

    mean + (Z − mean·Y)·(QᵀS)⁺·(Λ + ρ)⁻¹·Qᵀ,    ρ = ridge times the mean diagonal of Σ Gᵢ,

with ``mean`` that of the survivors, where `dare_agg.merge.wudi` has that of whole deltas. It leaves
the server as ``mean`` and two thin factors, which every party multiplies term by term: the
same bits everywhere, whatever the library of matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.masked import MaskedSource
from dare_agg.merge.by_tensor import Matrix, read_matrix
from dare_agg.merge.methods import METHODS
from dare_agg.secure.aggregate import FixedPoint, bad_words
from dare_agg.secure.private import rescale_of
from dare_agg.secure.sketch import SketchPlan
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.one_thread import one_blas_thread
from dare_agg.vectors.tiled import TiledVector, tiles

RIDGE = float(METHODS["wudi"].options["ridge"].default)
# What rounding puts into a sum's eigenvalues, in standard deviations.
_NOISE = 4.0
# The traces of honest parties' Gram matrices are 1 each; sketches give back a little more or less.
_TRACE = 1.25
_ROWS = 1 << 16


@dataclass(frozen=True)
class SolvedSource:
    """A merged delta: the survivors' mean, and for Linears left·rightᵀ on top of it.

    ``factors`` lie as a sketch does: (in, width) and (out, width) of each Linear.
    """

    mean: MaskedSource
    plan: SketchPlan
    factors: FloatVector

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.mean.size

    @cached_property
    def _pairs(self) -> dict[str, tuple[FloatVector, FloatVector]]:
        """By name: the factors that run over a tensor's first and its second dimension."""
        found = {}
        for one, grams, values in self.plan.parts():
            right = self.factors[grams].reshape(-1, one.width)
            left = self.factors[values].reshape(-1, one.width)
            name = one.linear.entry.name
            found[name] = (right, left) if one.linear.transposed else (left, right)
        return found

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with elements ``lo`` to ``hi``."""
        self.mean.read(lo, hi, out)
        for entry, first, last in self.plan.layout.pieces(lo, hi):
            pair = self._pairs.get(entry.name)
            if pair is None:
                continue
            columns = entry.shape[1]
            step = max(1, _ROWS // columns)
            for top in range(first // columns, -(-last // columns), step):
                end = min(top + step, entry.shape[0])
                product = _product(pair[0][top:end], pair[1]).reshape(-1)
                a, b = max(first, top * columns), min(last, end * columns)
                at = entry.offset - lo
                out[at + a : at + b] += product[a - top * columns : b - top * columns]

    def norm(self) -> float:
        """The delta's ‖·‖, in float64."""
        squares = (
            float(np.sum(np.square(tile, dtype=np.float64))) for _, tile in tiles(TiledVector(self))
        )
        return math.sqrt(math.fsum(squares))


def _product(first: FloatVector, second: FloatVector) -> FloatVector:
    """first·secondᵀ, a column of each after another: no sum whose order a library chooses."""
    found = np.zeros((len(first), len(second)), np.float32)
    term = np.empty_like(found)
    for column in range(first.shape[1]):
        np.multiply(first[:, column, None], second[None, :, column], out=term)
        found += term
    return found


def solve_sketches(
    mean: MaskedSource, plan: SketchPlan, sums: NDArray[np.int64], point: FixedPoint, parties: int
) -> FloatVector:
    """The factors of the merged delta, from the sums over ``parties`` of their sketches.

    Raises `ProtocolError` (reason "words") for sums that no honest parties add up to: Gram matrices
    that are no squares or too large, and a merged Linear beyond what so many clipped deltas reach.
    """
    factors = np.zeros(sums.size, np.float32)
    # What the rescale makes of a value of 1.
    widest = max(1.0, float(rescale_of(mean.mask).max()))
    for one, grams, values in plan.parts():
        outputs, inputs = one.linear.shape
        with one_blas_thread():
            y = sums[grams].reshape(inputs, one.width) * (point.clip / point.top)
            y /= plan.unit(one)
            z = sums[values].reshape(outputs, one.width) * (point.clip / point.top)
            # A word's rounding has a variance of at most 1/4.
            unit = point.clip / point.top / plan.unit(one)
            noise = _NOISE * math.sqrt(parties) / 2 * unit * math.sqrt(one.width)
            signs = plan.signs(one)
            found = _eigen(y, signs, noise, parties * plan.directions)
            if found is None:
                continue
            basis, sizes = found
            name = one.linear.entry.name
            if sizes.sum() > parties * _TRACE:
                raise bad_words(
                    f"Gram matrices of {name!r} of trace {sizes.sum():.4g}, at most {parties} is "
                    "possible"
                )
            middle = read_matrix(mean, one.linear.entry, 0, one.linear.transposed)
            ridge = RIDGE * float(sizes.sum()) / inputs
            against = np.linalg.lstsq((basis.T @ signs).T, (z - middle @ y).T, rcond=None)[0].T
            left = against / (sizes + ridge)
            largest = float(np.abs(middle + left @ basis.T).max())
            if not largest <= parties * point.clip * widest:
                raise bad_words(
                    f"a merged element of {name!r} of {largest:.4g}, at most {parties} times the "
                    "clip is possible"
                )
        width = sizes.size
        factors[grams].reshape(inputs, one.width)[:, :width] = basis
        factors[values].reshape(outputs, one.width)[:, :width] = left
    return factors


def _eigen(
    y: Matrix, signs: Matrix, noise: float, most: int
) -> tuple[Matrix, NDArray[np.float64]] | None:
    """Q and Λ of the Gram matrix whose sketch is ``y``; None where there is none.

    Raises `ProtocolError` (reason "words") where it has negative eigenvalues beyond the noise.
    """
    core = signs.T @ y
    sizes, vectors = np.linalg.eigh((core + core.T) / 2)
    if sizes[0] < -max(4 * noise, 0.02 * sizes[-1]):
        raise bad_words(
            f"a sum of Gram matrices with an eigenvalue of {sizes[0]:.4g}; they are squares"
        )
    kept = np.flatnonzero(sizes > noise)[-most:]
    if not kept.size:
        return None
    half = y @ (vectors[:, kept] / np.sqrt(sizes[kept]))
    basis, roots, _ = np.linalg.svd(half, full_matrices=False)
    return basis, roots**2
