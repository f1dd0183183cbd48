"""Methods whose result is a weighted sum with coefficients that depend on angles.

slerp, multislerp, karcher and model-stock all stay in the span of the models, so the matrix
of inner products of each tensor holds all they need: one pass sums it, a small calculation
gives a coefficient for every model, a second pass adds the models up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import MergeError
from dare_agg.merge.linear import NOTHING, weighted_sum
from dare_agg.merge.task import FIXED_BLOCK, Kernel, MergeTask, Span
from dare_agg.vectors.layout import Entry
from dare_agg.vectors.sources import DeltaSource

Matrix = NDArray[np.float64]
_STRAIGHT = 0.9995
_TINY = 1e-8


def gram_matrices(sources: list[DeltaSource], spans: list[Span]) -> Matrix:
    """Inner products ⟨x_i, x_j⟩ of every span, (spans, n, n) in float64."""
    result = np.zeros((len(spans), len(sources), len(sources)))
    stack = np.empty((len(sources), FIXED_BLOCK), np.float32)
    for number, (start, stop) in enumerate(spans):
        for lo in range(start, stop, FIXED_BLOCK):
            hi = min(stop, lo + FIXED_BLOCK)
            rows = []
            for source, row in zip(sources, stack, strict=True):
                source.read(lo, hi, row[: hi - lo])
                rows.append(row[: hi - lo].astype(np.float64))
            for i, left in enumerate(rows):
                for j in range(i, len(rows)):
                    product = float(np.dot(left, rows[j]))
                    result[number, i, j] += product
                    if j > i:
                        result[number, j, i] += product
    return result


def slerp(task: MergeTask) -> Kernel:
    """sin((1−t)θ)/sin θ·a + sin(tθ)/sin θ·b of two models (of BASE and one model alone).

    Where the two are almost parallel (|cos θ| > 0.9995) it is (1−t)·a + t·b.

    Raises `MergeError` for another number of models.
    """
    shares = task.shared("t")
    if task.count > 2:
        raise MergeError(f"slerp takes one model (with the base) or two, not {task.count}")

    def coefficients(number: int, gram: Matrix, weights: Matrix) -> Matrix:
        t = float(shares[number])
        a, b = (0, 1) if task.count == 1 else (1, 2)
        result = np.zeros(len(gram))
        first, second = math.sqrt(gram[a, a]), math.sqrt(gram[b, b])
        cosine = gram[a, b] / ((first if first > _TINY else 1) * (second if second > _TINY else 1))
        if abs(cosine) > _STRAIGHT:
            result[a], result[b] = 1 - t, t
        else:
            angle = math.acos(cosine)
            result[a] = math.sin((1 - t) * angle) / math.sin(angle)
            result[b] = math.sin(t * angle) / math.sin(angle)
        return result

    return of_models(task, "slerp", coefficients)


def karcher(task: MergeTask) -> Kernel:
    """Karcher mean of the models' directions on the sphere, times their mean norm."""
    iterations, tolerance = task.options["max-iter"], task.options["tol"]

    def coefficients(number: int, gram: Matrix, weights: Matrix) -> Matrix:
        shares = weights / (weights.sum() or 1.0)
        norms = np.sqrt(np.diagonal(gram)[1:])
        result = np.zeros(len(gram))
        valid = norms > tolerance
        if not valid.any():
            return result
        used = shares[valid] / shares[valid].sum()
        units = gram[1:, 1:][np.ix_(valid, valid)] / np.outer(norms[valid], norms[valid])
        mean = _sphere_mean(units, used, iterations, tolerance)
        result[1:][valid] = mean / norms[valid] * float(shares @ norms)
        return result

    return of_models(task, "karcher", coefficients)


def _sphere_mean(units: Matrix, weights: Matrix, iterations: int, tolerance: float) -> Matrix:
    """Coefficients, on unit vectors with inner products ``units``, of their Karcher mean."""

    def norm(c: Matrix) -> float:
        return math.sqrt(max(0.0, float(c @ units @ c)))

    size = norm(weights)
    mean = np.eye(len(weights))[0] if size < tolerance else weights / size
    for _ in range(iterations):
        tangent = np.zeros(len(weights))
        for i, weight in enumerate(weights):
            cosine = min(1.0, max(-1.0, float(mean @ units[i])))
            angle = math.acos(cosine)
            if angle < tolerance or math.pi - angle < tolerance:
                continue
            step = weight * angle / math.sin(angle)
            tangent[i] += step
            tangent -= step * cosine * mean
        length = norm(tangent)
        if length < tolerance:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        mean /= norm(mean) or 1.0
    return mean


def multislerp(task: MergeTask) -> Kernel:
    """Barycentric interpolation of the deltas' directions on the sphere, in the tangent space
    at their weighted mean, times their weighted mean norm.

    ``of`` "models" takes the directions of whole models. Raises `MergeError` where the directions
    or the weights cancel.
    """
    normalize = task.options["normalize-weights"]

    def coefficients(gram: Matrix, weights: Matrix) -> Matrix:
        if len(gram) == 1:
            return np.ones(1)
        if normalize and abs(weights.sum()) < NOTHING:
            raise MergeError(
                "multislerp divides by the sum of the weights, which is 0 here; change the "
                "weights, or give normalize-weights=false"
            )
        shares = weights / weights.sum() if normalize else weights
        norms = np.sqrt(np.diagonal(gram))
        scaled = shares / (norms + _TINY)
        size = math.sqrt(max(0.0, float(scaled @ gram @ scaled)))
        if size < _TINY:
            if not norms.any() or len(gram) == 2:
                return shares
            raise MergeError(
                "multislerp: the weighted directions cancel, they have no mean; change weights"
            )
        mean = scaled / size
        dots = (gram @ mean) / (norms + _TINY)
        tangent = scaled - float(shares @ dots) * mean
        length = math.sqrt(max(0.0, float(tangent @ gram @ tangent))) + _TINY
        result = math.cos(length) * mean + math.sin(length) / length * tangent
        return result * float(shares @ norms)

    if task.options["of"] == "models":
        return of_models(
            task,
            "multislerp",
            lambda _, gram, weights: _behind(coefficients(gram[1:, 1:], weights)),
        )
    spans = list(task.tensor_spans)
    grams = gram_matrices(list(task.sources), spans)
    weights = task.values_at(task.weights, spans)
    found = np.stack([coefficients(g, weights[:, i]) for i, g in enumerate(grams)], axis=1)
    return weighted_sum(task, found * task.values_at(task.scaling, spans), None, spans)


def _behind(coefficients: Matrix) -> Matrix:
    """Coefficients of the models behind that of the base, which has none."""
    return np.concatenate([[0.0], coefficients])


def model_stock(task: MergeTask) -> Kernel:
    """t·mean δ with t = n·cos θ / (1 + (n−1)·cos θ), θ the mean angle between the deltas.

    ``filter-wise`` takes an angle for every row of a tensor instead of one for the tensor.

    Raises `MergeError` for fewer than two models.
    """
    if task.count < 2:
        raise MergeError("model-stock needs two models or more beside the base")
    spans = row_spans(task) if task.options["filter-wise"] else list(task.tensor_spans)
    grams = gram_matrices(list(task.sources), spans)
    pairs = [(i, j) for i in range(task.count) for j in range(i + 1, task.count)]
    cosines = np.zeros(len(spans))
    for i, j in pairs:
        norms = np.sqrt(grams[:, i, i]) * np.sqrt(grams[:, j, j])
        cosines += np.clip(grams[:, i, j] / np.maximum(norms, 1e-6), -1, 1)
    cosines /= len(pairs)
    divisor = 1 + (task.count - 1) * cosines
    # Where the deltas oppose one another there is no estimate: the base stays.
    shares = np.divide(cosines, divisor, out=np.zeros_like(cosines), where=np.abs(divisor) >= 1e-6)
    shares *= task.values_at(task.scaling, spans)
    return weighted_sum(task, np.tile(shares, (task.count, 1)), None, spans)


def row_spans(task: MergeTask) -> list[Span]:
    """The spans of all rows, along each tensor's last dimension; a vector is one row."""
    spans = []
    for entry in task.layout.entries:
        width = _row_width(entry)
        spans += [(lo, lo + width) for lo in range(entry.offset, entry.stop, width or 1)]
    return spans


def _row_width(entry: Entry) -> int:
    return entry.shape[-1] if len(entry.shape) > 1 else entry.size


def of_models(
    task: MergeTask,
    name: str,
    coefficients: Callable[[int, Matrix, Matrix], Matrix],
    among: Sequence[Span] | None = None,
) -> Kernel:
    """Merge whole models θ = base + δ with coefficients (base first) that follow from a span's
    number, its models' products and their weights; the spans are the tensors unless others are
    given."""
    base = task.need_base(name)
    spans = list(task.tensor_spans if among is None else among)
    grams = gram_matrices([base, *task.sources], spans)
    # From products of base and deltas to those of base and models.
    change = np.eye(task.count + 1)
    change[1:, 0] = 1
    weights = task.values_at(task.weights, spans)
    found = np.stack(
        [coefficients(i, change @ g @ change.T, weights[:, i]) for i, g in enumerate(grams)],
        axis=1,
    )
    scaling = task.values_at(task.scaling, spans)
    # Σ c·θ − base = Σ c·δ + (Σc − 1)·base
    return weighted_sum(task, found[1:] * scaling, (base, (found.sum(axis=0) - 1) * scaling), spans)
