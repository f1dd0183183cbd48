"""RegMean: each Linear solves a least-squares problem on all models' inputs (arXiv 2212.09849).

The merged weight W minimises Σ ‖X_i·W − X_i·W_i‖²: Wᵀ = (ΣG_i)⁻¹·Σ G_i·W_iᵀ with
G_i = X_iᵀ·X_i / rows. Every other parameter is averaged.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import MergeError
from dare_agg.merge.by_tensor import Matrix, by_tensor, span_of
from dare_agg.merge.linear import normalized, weighted_sum
from dare_agg.merge.task import Kernel, MergeTask
from dare_agg.vectors.layout import Entry


def regmean(task: MergeTask) -> Kernel:
    """λ·(ΣwG + ridge)⁻¹·Σ wG·δᵀ for each Linear with Gram matrices, else the mean.

    ``off-diagonal`` multiplies the Gram matrices' off-diagonal entries; ``ridge`` times the
    mean diagonal is added to the diagonal of the sum, so that inputs that never vary
    (a singular sum) still have a solution: there the models are averaged.

    Raises `MergeError` unless every model has statistics that name Linears of the layout.
    """
    mean = weighted_sum(task, normalized(task.weights) * task.scaling)
    if len(task.statistics) != task.count:
        raise MergeError(
            f"regmean needs a statistics file for each of the {task.count} models, "
            f"{len(task.statistics)} are given; make them with dare-agg statistics"
        )
    grams = gram_matrices(task)
    solved = [e for e in task.layout.entries if any(e.name in s for s in grams)]
    if not solved:
        raise MergeError(
            "the statistics name no Linear weight of the model; make them with "
            "dare-agg statistics --kind gram on this model"
        )
    for entry in solved:
        for number, values in enumerate(grams):
            _check_gram(entry, number, values)
    return by_tensor(task, mean, solved, lambda entry: _solve(task, entry))


def gram_matrices(task: MergeTask) -> list[Mapping[str, NDArray]]:
    """Each model's Gram matrices by weight; raises `MergeError` for other statistics."""
    found = [values for values in task.statistics if isinstance(values, Mapping)]
    if len(found) != len(task.statistics):
        raise MergeError("regmean needs Gram matrices by name, not Fisher values")
    return found


def _check_gram(entry: Entry, number: int, values: Mapping[str, NDArray]) -> None:
    if entry.name not in values:
        raise MergeError(
            f"statistics {number} have no Gram matrix of {entry.name!r}, others do; make all of "
            "them with the same options"
        )
    gram = values[entry.name]
    if len(entry.shape) != 2 or gram.shape != (entry.shape[1], entry.shape[1]):
        raise MergeError(
            f"statistics {number}: Gram matrix of {entry.name!r} has shape {gram.shape}, "
            f"({entry.shape[-1]}, {entry.shape[-1]}) is needed"
        )
    if not np.isfinite(gram).all():
        raise MergeError(f"statistics {number}: Gram matrix of {entry.name!r} is not finite")


def _solve(task: MergeTask, entry: Entry) -> Matrix:
    rows, inputs = entry.shape
    span = span_of(task, entry)
    weights = task.weights[:, span] / task.weights[:, span].sum()
    off_diagonal = task.options["off-diagonal"]
    total = np.zeros((inputs, inputs))
    right = np.zeros((inputs, rows))
    mean = np.zeros((inputs, rows))
    piece = np.empty(entry.size, np.float32)
    for source, values, weight in zip(task.sources, gram_matrices(task), weights, strict=True):
        gram = np.asarray(values[entry.name], np.float64) * weight
        diagonal = np.diagonal(gram).copy()
        gram = gram * off_diagonal
        np.fill_diagonal(gram, diagonal)
        source.read(entry.offset, entry.stop, piece)
        delta = piece.reshape(rows, inputs).T.astype(np.float64)
        total += gram
        right += gram @ delta
        mean += weight * delta
    # The ridge pulls towards the mean, which is the answer where no input ever came.
    ridge = task.options["ridge"] * (float(np.trace(total)) / inputs or 1.0)
    total[np.diag_indices(inputs)] += ridge
    right += ridge * mean
    try:
        solution = np.linalg.solve(total, right)
    except np.linalg.LinAlgError as error:
        raise MergeError(
            f"the Gram matrices of {entry.name!r} sum to a singular matrix; give a ridge above 0, "
            "for example --option ridge=1e-6"
        ) from error
    return solution.T
