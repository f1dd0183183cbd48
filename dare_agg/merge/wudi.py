"""WUDI in closed form: RegMean whose Gram matrices are the deltas' own, without any data.

WUDI-Merging (arXiv 2503.08099) looks for the merged delta τ of a Linear that minimises
Σ ‖(τ − τᵢ)·τᵢᵀ‖² / ‖τᵢ‖², for a delta's rows span the inputs that it was trained on, and runs Adam
on it. The minimum is known: with τ of shape (out, in) and Gᵢ = τᵢᵀ·τᵢ / ‖τᵢ‖²,

    τ = (Σ wᵢ·τᵢ·Gᵢ + ρ·mean)·(Σ wᵢ·Gᵢ + ρ)⁻¹,  ρ = ridge times the mean diagonal of Σ wᵢ·Gᵢ,

where the ridge pulls to the mean of the deltas wherever no Gᵢ speaks. With Aᵢ = τᵢ·√wᵢ/‖τᵢ‖ one
above the other (A) and (τᵢ − mean)·Aᵢᵀ beside each other (B) it is mean + B·A·(AᵀA + ρ)⁻¹, and also
mean + B·(A·Aᵀ + ρ)⁻¹·A: the smaller of the two systems is solved. The values τᵢ and what Gᵢ is made
of may be two: the survivors of an update and the directions that it carries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import MergeError
from dare_agg.merge.by_tensor import Matrix, by_tensor, read_matrix, shares_of
from dare_agg.merge.linear import normalized, weighted_sum
from dare_agg.merge.linears import Linear, linears_of
from dare_agg.merge.task import Kernel, MergeTask, Statistics
from dare_agg.vectors.layout import Entry
from dare_agg.vectors.sources import DeltaSource


def wudi(task: MergeTask) -> Kernel:
    """λ·(Σ w·τ·G + ρ·mean)·(Σ w·G + ρ)⁻¹ for each Linear, λ·mean for all others.

    ``task.statistics`` say what the Gram matrices are made of where not of the deltas themselves,
    a model each: another delta over the layout, or directions σⱼ·vⱼ, (rank, in), by tensor name. A
    model without change or directions in a tensor has no Gram matrix there.

    Raises `MergeError` for negative weights, statistics of another model, and values that are not
    finite.
    """
    linears = linears_of(task, "wudi")
    for linear in linears.values():
        shares_of(task, linear.entry, "wudi")
    sources = _checked_sources(task, linears)

    def solve(entry: Entry) -> Matrix:
        linear = linears[entry.name]
        solved = _solve(task, linear, sources)
        return solved.T if linear.transposed else solved

    mean = weighted_sum(task, normalized(task.weights) * task.scaling)
    return by_tensor(task, mean, [linear.entry for linear in linears.values()], solve)


def _checked_sources(task: MergeTask, linears: Mapping[str, Linear]) -> Sequence[Statistics]:
    """What each model's Gram matrices are made of."""
    if not task.statistics:
        return task.sources
    if len(task.statistics) != task.count:
        raise MergeError(
            f"{len(task.statistics)} sources of Gram matrices for {task.count} models; give one "
            "for each, or none"
        )
    for number, found in enumerate(task.statistics):
        if isinstance(found, DeltaSource):
            if found.size != task.layout.size:
                raise MergeError(
                    f"the Gram matrices' source {number} has {found.size} parameters, the model "
                    f"{task.layout.size}; give the delta of the same model"
                )
            continue
        for name, directions in found.items():
            linear = linears.get(name)
            if linear is not None:
                _check_directions(number, linear, directions)
    return task.statistics


def _check_directions(number: int, linear: Linear, directions: NDArray[np.floating]) -> None:
    if directions.ndim != 2 or directions.shape[1] != linear.shape[1]:
        raise MergeError(
            f"model {number}: directions of {linear.entry.name!r} have shape {directions.shape}, "
            f"(rank, {linear.shape[1]}) is needed"
        )
    if not np.isfinite(directions).all():
        raise MergeError(
            f"model {number}: a direction of {linear.entry.name!r} is not finite",
            reason="non-finite",
        )


def _factor(found: Statistics, linear: Linear, number: int, values: Matrix | None) -> Matrix:
    """A with AᵀA = G, of norm 1; no row where there is no change."""
    if values is not None:
        rows = values
    elif isinstance(found, DeltaSource):
        rows = read_matrix(found, linear.entry, number, linear.transposed)
    else:
        empty = np.empty((0, linear.shape[1]))
        rows = np.asarray(found.get(linear.entry.name, empty), np.float64)
    norm = float(np.sqrt(np.square(rows).sum()))
    return rows / norm if norm > 0 else rows[:0]


def _solve(task: MergeTask, linear: Linear, sources: Sequence[Statistics]) -> Matrix:
    outputs, inputs = linear.shape
    shares = shares_of(task, linear.entry, "wudi")

    def values_of(number: int) -> Matrix:
        return read_matrix(task.sources[number], linear.entry, number, linear.transposed)

    def factor_of(number: int, values: Matrix) -> Matrix:
        own = values if sources[number] is task.sources[number] else None
        return _factor(sources[number], linear, number, own) * np.sqrt(shares[number])

    mean = np.zeros((outputs, inputs))
    for number, share in enumerate(shares):
        mean += share * values_of(number)
    factors = None if _is_wide(linear, sources) else np.empty((0, inputs))
    right = np.zeros((outputs, inputs)) if factors is None else np.empty((outputs, 0))
    total = np.zeros((inputs, inputs))
    for number in range(task.count):
        values = values_of(number)
        factor = factor_of(number, values)
        values -= mean
        if factors is not None:
            factors = np.concatenate([factors, factor])
            right = np.concatenate([right, values @ factor.T], axis=1)
        elif outputs < inputs:
            total += factor.T @ factor
            right += (values @ factor.T) @ factor
        else:
            gram = factor.T @ factor
            total += gram
            right += values @ gram
    if factors is not None:
        trace = float(np.square(factors).sum())
        total = factors @ factors.T
    else:
        trace = float(np.trace(total))
    if not trace > 0:
        return mean
    # Never singular: the ridge is a share of the mean diagonal.
    total[np.diag_indices(len(total))] += task.options["ridge"] * trace / inputs
    answer = np.linalg.solve(total, right.T).T
    return mean + (answer if factors is None else answer @ factors)


def _is_wide(linear: Linear, sources: Sequence[Statistics]) -> bool:
    """Whether the Gram matrices' factors have more rows together than a layer has inputs."""
    outputs, inputs = linear.shape
    rows = 0
    for found in sources:
        if isinstance(found, DeltaSource):
            rows += outputs
        else:
            rows += len(found.get(linear.entry.name, ()))
    return rows >= inputs
