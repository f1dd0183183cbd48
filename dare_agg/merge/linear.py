"""Weighted sums: average, task arithmetic, linear, and whatever ends in coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import MergeError
from dare_agg.merge.task import Kernel, MergeTask, Scratch, Span, cut, span_starts
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource, listed

# Sums of weights below this are no divisors.
NOTHING = 1e-8


def average(task: MergeTask) -> Kernel:
    """λ·Σ w·δ, the weights as they are (1/n by default)."""
    return weighted_sum(task, task.weights * task.scaling)


def task_arithmetic(task: MergeTask) -> Kernel:
    """λ·Σ w·δ, divided by Σw with ``normalize`` (arXiv 2212.04089)."""
    weights = normalized(task.weights) if task.options["normalize"] else task.weights
    return weighted_sum(task, weights * task.scaling)


def linear(task: MergeTask) -> Kernel:
    """Σ w·θ of whole models, divided by Σw with ``normalize``.

    Raises `MergeError` where that is 0.
    """
    weights = task.weights
    if task.options["normalize"]:
        if (np.abs(weights.sum(axis=0)) < NOTHING).any():
            raise MergeError(
                "linear divides by the sum of the weights, which is 0 here; change the weights, or "
                "give normalize=false"
            )
        weights = normalized(weights)
    # Σ w·θ − base = Σ w·δ + (Σw − 1)·base
    surplus = weights.sum(axis=0) - 1
    if np.all(np.abs(surplus) < 1e-12):
        return weighted_sum(task, weights * task.scaling)
    base = task.need_base("linear without weights that sum to 1")
    return weighted_sum(task, weights * task.scaling, (base, surplus * task.scaling))


def normalized(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights divided by their sum over the models; weights that cancel stay."""
    total = weights.sum(axis=0)
    return weights / np.where(np.abs(total) < NOTHING, 1.0, total)


def weighted_sum(
    task: MergeTask,
    coefficients: NDArray[np.float64],
    base: tuple[DeltaSource, NDArray[np.float64]] | None = None,
    spans: Sequence[Span] | None = None,
) -> Kernel:
    """Σ c·δ (+ c·base) with coefficients (models, spans), models added in their order.

    Where the task writes models, the base's own 1 is in its coefficient."""
    chosen = task.spans if spans is None else tuple(spans)
    if task.writes_model:
        surplus = np.zeros(len(chosen)) if base is None else base[1]
        base = (task.need_base("a whole model"), surplus + 1)
    starts = span_starts(chosen)
    factors = coefficients.astype(np.float32)
    equal = np.all(factors == factors[:1], axis=0)
    if base is None and task.is_sparse:
        return _sparse_sum(task, factors, chosen, starts)

    def kernel(lo: int, hi: int, out: FloatVector, scratch: Scratch) -> None:
        row = scratch.get("row", hi - lo)
        pieces = list(cut(chosen, starts, lo, hi))
        for i, source in enumerate(task.sources):
            target = row if i else out
            source.read(lo, hi, target)
            for span, a, b in pieces:
                if not equal[span] and factors[i, span] != 1:
                    target[a - lo : b - lo] *= factors[i, span]
            if i:
                out += row
        for span, a, b in pieces:
            if equal[span] and factors[0, span] != 1:
                out[a - lo : b - lo] *= factors[0, span]
        if base is not None:
            base[0].read(lo, hi, row)
            for span, a, b in pieces:
                row[a - lo : b - lo] *= np.float32(base[1][span])
            out += row

    return kernel


def _sparse_sum(
    task: MergeTask,
    factors: NDArray[np.float32],
    spans: Sequence[Span],
    starts: NDArray[np.int64],
) -> Kernel:
    def kernel(lo: int, hi: int, out: FloatVector, scratch: Scratch) -> None:
        out[:] = 0
        for span, a, b in cut(spans, starts, lo, hi):
            for i, (source, factor) in enumerate(zip(task.sources, factors[:, span], strict=True)):
                for positions, values in listed(source, a, b):
                    at = positions - lo if lo else positions
                    values = values * factor
                    # Before the first source there is nothing to add to.
                    if i:
                        np.add.at(out, at, values)
                    else:
                        out[at] = values

    return kernel
