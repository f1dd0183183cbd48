"""Merges in the deltas' singular vectors: Iso-C, TSV-M and KnOTS, Linear by Linear.

Decompositions are of float64 and of one layer at a time; singular values that are rounding (below
`_NOTHING` of the largest) have no directions, so that what no model changed stays unchanged. Other
tensors are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import MergeError
from dare_agg.merge.by_tensor import Matrix, by_tensor, read_matrix, span_of
from dare_agg.merge.linear import normalized, weighted_sum
from dare_agg.merge.linears import Linear, linears_of
from dare_agg.merge.task import Kernel, MergeTask
from dare_agg.vectors.layout import Entry

# Deltas come in float32.
_NOTHING = 1e-6


def iso_c(task: MergeTask) -> Kernel:
    """λ·mean(σ)·U·Vᵀ of the sum Σ w·δ = U·σ·Vᵀ: all common directions equally strong."""
    return _by_linear(task, "iso-c", _isotropic)


def tsv_m(task: MergeTask) -> Kernel:
    """λ·U·Σ·Vᵀ: each model's leading singular triples side by side, U and V made orthogonal.

    With ``share`` of 1/T a model gives min(out, in)/T triples; nearest orthogonal matrices are
    their polar factors.
    """
    return _by_linear(task, "tsv-m", _task_vectors)


def knots(task: MergeTask) -> Kernel:
    """λ·U·TIES(Uᵀδ₁, …, Uᵀδₙ), U the left singular vectors of [δ₁ … δₙ], which all share.

    Raises `MergeError` for weights that cannot be (see `dare_agg.merge.linear`).
    """
    return _by_linear(task, "knots", _aligned)


def _by_linear(
    task: MergeTask, method: str, solve: Callable[[MergeTask, Linear], Matrix]
) -> Kernel:
    linears: Mapping[str, Linear] = linears_of(task, method)
    if (np.abs(task.weights.sum(axis=0)) < 1e-8).any():
        raise MergeError(f"{method} averages what is no Linear: the weights sum to 0; change them")

    def solved(entry: Entry) -> Matrix:
        linear = linears[entry.name]
        merged = solve(task, linear)
        return merged.T if linear.transposed else merged

    mean = weighted_sum(task, normalized(task.weights) * task.scaling)
    return by_tensor(task, mean, [linear.entry for linear in linears.values()], solved)


def _weights(task: MergeTask, linear: Linear) -> NDArray[np.float64]:
    return task.weights[:, span_of(task, linear.entry)]


def _values(task: MergeTask, linear: Linear, number: int) -> Matrix:
    return read_matrix(task.sources[number], linear.entry, number, linear.transposed)


def _isotropic(task: MergeTask, linear: Linear) -> Matrix:
    total = np.zeros(linear.shape)
    for number, weight in enumerate(_weights(task, linear)):
        total += weight * _values(task, linear, number)
    left, sizes, right = np.linalg.svd(total, full_matrices=False)
    kept = int((sizes > _NOTHING * sizes[0]).sum())
    return float(sizes.mean()) * (left[:, :kept] @ right[:kept])


def _task_vectors(task: MergeTask, linear: Linear) -> Matrix:
    smaller = min(linear.shape)
    share = task.options["share"] or 1 / task.count
    kept = max(1, int(smaller * share))
    lefts, sizes, rights = [], [], []
    for number, weight in enumerate(_weights(task, linear)):
        left, size, right = _leading(_values(task, linear, number), kept)
        lefts.append(left)
        sizes.append(weight * size)
        rights.append(right)
    left, right = np.concatenate(lefts, axis=1), np.concatenate(rights)
    if not left.shape[1]:
        return np.zeros(linear.shape)
    return (_polar(left) * np.concatenate(sizes)) @ _polar(right.T).T


def _leading(delta: Matrix, most: int) -> tuple[Matrix, Matrix, Matrix]:
    """The largest singular triples, by the eigenvectors of the smaller of δδᵀ and δᵀδ."""
    turned = delta.shape[0] > delta.shape[1]
    square = delta.T @ delta if turned else delta @ delta.T
    values, vectors = np.linalg.eigh(square)
    order = np.argsort(-values, kind="stable")[:most]
    order = order[values[order] > _NOTHING**2 * max(float(values.max()), 1e-300)]
    sizes = np.sqrt(values[order])
    known = vectors[:, order]
    if turned:
        return (delta @ known) / sizes, sizes, known.T
    return known, sizes, (known.T @ delta) / sizes[:, None]


def _polar(columns: Matrix) -> Matrix:
    """The nearest matrix with orthonormal columns; of columns that are one, their shares of it."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    good = values > _NOTHING**2 * float(values.max())
    root = np.zeros_like(values)
    root[good] = 1 / np.sqrt(values[good])
    return columns @ ((vectors * root) @ vectors.T)


def _aligned(task: MergeTask, linear: Linear) -> Matrix:
    outputs = linear.shape[0]
    deltas = [_values(task, linear, number) for number in range(task.count)]
    together = np.concatenate(deltas, axis=1)
    if together.shape[1] > outputs:
        # The left singular vectors are those of the small triangle.
        together = np.asarray(np.linalg.qr(together.T, mode="r")).T
    basis, sizes, _ = np.linalg.svd(together, full_matrices=False)
    basis = basis[:, sizes > _NOTHING * max(float(sizes[0]), 1e-300)]
    merged = np.zeros((basis.shape[1], linear.shape[1]))
    agreeing = np.zeros_like(merged)
    trims = task.per_model("trim")
    aligned = [_trimmed(basis.T @ d, t) for d, t in zip(deltas, trims, strict=True)]
    weights = _weights(task, linear)
    elected = np.sign(sum(w * a for w, a in zip(weights, aligned, strict=True)))
    for weight, values in zip(weights, aligned, strict=True):
        agrees = values * elected > 0
        merged += np.where(agrees, weight * values, 0)
        agreeing += np.where(agrees, weight, 0)
    divisor = np.where(agreeing != 0, agreeing, 1)
    return basis @ (merged / divisor)


def _trimmed(values: Matrix, share: float) -> Matrix:
    """Without the ``share`` of smallest magnitude."""
    removed = int(values.size * share)
    if not removed:
        return values
    sizes = np.abs(values)
    limit = np.partition(sizes.reshape(-1), removed - 1)[removed - 1]
    return np.where(sizes > limit, values, 0)
