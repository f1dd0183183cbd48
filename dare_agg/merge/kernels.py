"""Merge kernels: pure functions of a stack of delta tiles, (models, elements) float32.

Every kernel adds the models in row order, element by element, so the result does not
depend on how the vector is cut into tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dare_agg.layout import FloatVector

Stack = NDArray[np.float32]


def weighted_sum(stack: Stack, weights: Sequence[float]) -> FloatVector:
    """Σ w_i·δ_i, in the order of the rows."""
    total = stack[0] * np.float32(weights[0])
    for row, weight in zip(stack[1:], weights[1:], strict=True):
        total += row * np.float32(weight)
    return total


def elect_signs(weighted: Stack) -> FloatVector:
    """Sign of the summed (weighted) deltas per element: −1, 0 or 1 (TIES, step 2)."""
    total = weighted[0].copy()
    for row in weighted[1:]:
        total += row
    return np.sign(total)


def agreeing_sum(weighted: Stack, signs: FloatVector) -> FloatVector:
    """Sum of the entries whose sign is the elected one."""
    total = np.zeros_like(signs)
    for row in weighted:
        total += np.where(row * signs > 0, row, np.float32(0))
    return total


def agreeing_weight(weighted: Stack, signs: FloatVector, weights: Sequence[float]) -> FloatVector:
    """Sum of the weights of the models that agree with the elected sign, per element."""
    total = np.zeros_like(signs)
    for row, weight in zip(weighted, weights, strict=True):
        total += np.where(row * signs > 0, np.float32(weight), np.float32(0))
    return total


def trim_small(row: FloatVector, threshold: np.float32 | FloatVector, keep_equal: bool) -> None:
    """Zero, in place, what is below the threshold (TIES, step 1)."""
    if keep_equal:
        row[np.abs(row) < threshold] = 0
    else:
        row[np.abs(row) <= threshold] = 0
