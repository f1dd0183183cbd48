"""NuSLERP: spherical interpolation of two deltas or models by weights, tensor- or vectorwise."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import MergeError
from dare_agg.merge.linear import weighted_sum
from dare_agg.merge.spherical import Matrix, gram_matrices, of_models, row_spans
from dare_agg.merge.task import FIXED_BLOCK, Kernel, MergeTask, Scratch, cut, span_starts
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource

_LEAST_NORM = 1e-7


def nuslerp(task: MergeTask) -> Kernel:
    """sin((1−t)θ)/sin θ·a + sin(tθ)/sin θ·b of two deltas, t = w_b/(w_a + w_b).

    θ is the angle between the two tensors, or with ``along`` rows or columns one for each row
    (along the last dimension) or column (along the first). ``of`` "models" takes whole models.

    Raises `MergeError` for another number of models.
    """
    if task.count != 2:
        raise MergeError(f"nuslerp takes two models, not {task.count}")
    along, whole = task.options["along"], task.options["of"] == "models"
    if along == "columns":
        return _by_columns(task, whole)
    spans = row_spans(task) if along == "rows" else list(task.tensor_spans)
    if whole:

        def one(_: int, gram: Matrix, weights: Matrix) -> Matrix:
            return _coefficients(gram[None], weights[:, None])[:, 0]

        return of_models(task, "nuslerp of models", one, spans)
    grams = np.pad(gram_matrices(list(task.sources), spans), ((0, 0), (1, 0), (1, 0)))
    found = _coefficients(grams, task.values_at(task.weights, spans))
    return weighted_sum(task, found[1:] * task.values_at(task.scaling, spans), None, spans)


def _coefficients(grams: Matrix, weights: Matrix) -> Matrix:
    """Coefficients of base (0), a and b from their products (groups, 3, 3), as (3, groups)."""
    total = weights.sum(axis=0)
    t = np.where(np.abs(total) < 1e-6, 0.5, weights[1] / np.where(total == 0, 1, total))
    norms = [np.maximum(np.sqrt(grams[:, i, i]), _LEAST_NORM) for i in (1, 2)]
    cosine = np.clip(grams[:, 1, 2] / norms[0] / norms[1], -1, 1)
    straight = 1 - cosine**2 <= 1e-16
    angle = np.arccos(np.where(straight, 0, cosine))
    a = np.where(straight, 1 - t, np.sin((1 - t) * angle) / np.sin(angle))
    b = np.where(straight, t, np.sin(t * angle) / np.sin(angle))
    return np.stack([np.zeros_like(a), a, b])


def _by_columns(task: MergeTask, of_models: bool) -> Kernel:
    """The kernel with a coefficient for each place in what lies behind the first dimension."""
    spans = task.tensor_spans
    starts = span_starts(spans)
    weights = task.values_at(task.weights, spans)
    scaling = task.values_at(task.scaling, spans)
    shapes = [entry.shape for entry in task.layout.entries if entry.size]
    widths = [math.prod(shape[1:]) if len(shape) > 1 else 1 for shape in shapes]
    sources = [*task.sources]
    if of_models or task.writes_model:
        sources.append(task.need_base("nuslerp of models"))
    tables = []
    for number, (span, width) in enumerate(zip(spans, widths, strict=True)):
        grams = _column_products(sources, span, width, of_models)
        own = np.repeat(weights[:, number : number + 1], width, axis=1)
        found = _coefficients(grams, own)
        surplus = found[1] + found[2] - 1 if of_models else np.zeros(width)
        rows = np.stack([found[1], found[2], surplus]) * scaling[number]
        rows[2] += task.writes_model
        tables.append(rows.astype(np.float32))

    def kernel(lo: int, hi: int, out: FloatVector, scratch: Scratch) -> None:
        out[:] = 0
        row = scratch.get("row", hi - lo)
        for i, source in enumerate(sources):
            source.read(lo, hi, row)
            for span, a, b in cut(spans, starts, lo, hi):
                places = np.arange(a, b) - spans[span][0]
                row[a - lo : b - lo] *= tables[span][i][places % widths[span]]
            out += row

    return kernel


def _column_products(
    sources: list[DeltaSource], span: tuple[int, int], width: int, whole: bool
) -> NDArray[np.float64]:
    """Products of a and b in each column, (width, 3, 3); of base + a and base + b if ``whole``."""
    grams = np.zeros((width, 3, 3))
    step = max(1, FIXED_BLOCK // width) * width
    buffer = np.empty(step, np.float32)
    for lo in range(*span, step):
        hi = min(span[1], lo + step)
        rows = []
        for source in sources:
            source.read(lo, hi, buffer[: hi - lo])
            rows.append(buffer[: hi - lo].astype(np.float64).reshape(-1, width))
        a, b = (rows[0] + rows[2], rows[1] + rows[2]) if whole else (rows[0], rows[1])
        for i, j, left, right in ((1, 1, a, a), (1, 2, a, b), (2, 2, b, b)):
            grams[:, i, j] += (left * right).sum(axis=0)
    return grams
