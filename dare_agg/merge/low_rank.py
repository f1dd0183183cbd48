"""The mean of products B·A, exactly, and its best approximation of a given rank.

Averaging factors is not averaging what they mean: mean(B)·mean(A) ≠ mean(B·A) (arXiv 2410.09432).
The mean of products is one product of stacked factors, Σ w·B·A = [w₁B₁ w₂B₂ …]·[A₁; A₂; …], of
rank Σr; its truncated singular value decomposition is the nearest matrix of rank r (Eckart-Young),
found from the stacks alone where they are narrower than the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import MergeError

Matrix = NDArray[np.float64]
# Singular values below this share of the largest are the factors' own rounding.
_ROUNDING = 2.0**-24
# The least that a direction of A may count for beside the strongest.
_WEAKEST = 0.3


@dataclass(frozen=True)
class Truncated:
    """Factors B (m, r) and A (r, n) in float32, and what their product lacks of the exact mean.

    ``error`` is ‖M − B·A‖/‖M‖ in Frobenius' norm, ``rank`` that of the exact mean M.
    """

    b: NDArray[np.float32]
    a: NDArray[np.float32]
    error: float
    rank: int


def mean_of_products(
    pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]], weights: Sequence[float]
) -> Truncated:
    """Σ w·B·A of pairs (B (m, r), A (r, n)) of one rank r, as a pair of that rank.

    Of all pairs of factors with that product, the one is taken whose A is nearest to the mean of
    the clients' in its row space: a component stays what it was from round to round, the change
    is as small as the mean's, and components that no client has used yet keep their start.

    Raises `MergeError` for no pair, other shapes, and products that are not finite.
    """
    shapes = {(b.shape, a.shape) for b, a in pairs}
    if len(shapes) != 1 or len(pairs) != len(weights):
        raise MergeError(
            f"{len(pairs)} pairs of factors of shapes {sorted(shapes)} with {len(weights)} "
            "weights; pairs of one shape and a weight each are needed"
        )
    rank = pairs[0][1].shape[0]
    left = np.concatenate([w * b.astype(np.float64) for (b, _), w in _each(pairs, weights)], axis=1)
    right = np.concatenate([a.astype(np.float64) for _, a in pairs])
    mean = sum(w * a.astype(np.float64) for (_, a), w in _each(pairs, weights))
    assert not isinstance(mean, int)
    u, s, v = _decompose(left, right)
    if not np.isfinite(s).all():
        raise MergeError(
            "the mean of the clients' products is not finite; lower the learning rate, or leave "
            "the client out whose adapter grew"
        )
    whole = int(np.count_nonzero(s > s[0] * _ROUNDING)) if s.size and s[0] > 0 else 0
    kept = min(rank, whole)
    norm = math.sqrt(math.fsum(s**2))
    lost = math.sqrt(math.fsum(s[kept:] ** 2))
    a, b = _near(mean, u[:, :kept] * s[:kept], v[:kept])
    error = lost / norm if norm else 0.0
    return Truncated(b.astype(np.float32), a.astype(np.float32), error, whole)


def _each(pairs: Sequence[Any], weights: Sequence[float]) -> Any:
    return zip(pairs, weights, strict=True)


def _decompose(left: Matrix, right: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Singular vectors and values of left·right, by the smaller of stack and matrix."""
    try:
        if left.shape[1] < min(left.shape[0], right.shape[1]):
            q, upper = np.linalg.qr(left)
            p, lower = np.linalg.qr(right.T)
            u, s, v = np.linalg.svd(upper @ lower.T)
            return q @ u, s, v @ p.T
        u, s, v = np.linalg.svd(left @ right, full_matrices=False)
    except np.linalg.LinAlgError as error:
        raise MergeError(
            "the mean of the clients' products has no singular values; lower the learning rate, or "
            "merge by factors"
        ) from error
    return u, s, v


def _near(mean: Matrix, scaled: Matrix, v: Matrix) -> tuple[Matrix, Matrix]:
    """A (r, n) and B (m, r) with B·A = scaled·v, where A is near ``mean``.

    A is ``mean`` projected on v and what of its own row space is left beside v, of r dimensions
    together: W; so B = scaled·v·A⁺ is exact. Weak directions of G = mean·Wᵀ are made stronger
    before, so that none is divided by next to nothing.
    """
    beside = mean - (mean @ v.T) @ v
    others = np.linalg.svd(beside, full_matrices=False)[2][: len(mean) - len(v)]
    w = np.concatenate([v, others])
    p, d, q = np.linalg.svd(mean @ w.T)
    strong = np.maximum(d, _WEAKEST * (d.max(initial=0.0) or 1.0))
    a = (p * strong) @ (q @ w)
    b = scaled @ ((q.T / strong) @ p.T)[: len(v)]
    return a, b
