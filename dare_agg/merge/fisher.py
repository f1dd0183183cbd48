"""Fisher merging: models weighted, element by element, by their Fisher values.

Reference: arXiv 2111.09832, with the options of the DARE paper's code.
"""

from __future__ import annotations

import math

import numpy as np

from dare_agg.errors import MergeError
from dare_agg.merge.task import FIXED_BLOCK, Kernel, MergeTask, Scratch, cut, span_starts
from dare_agg.merge.wrapped import NamedSource
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource


def fisher(task: MergeTask) -> Kernel:
    """λ·Σ c·(F + ε)·δ / Σ c·(F + ε), c the weights (1/n), F each model's Fisher values.

    With ``normalize`` c is divided by ‖F‖₂ + ε of the whole model, and made to sum to 1.
    Parameters without Fisher values (unused in the forward pass) are averaged.
    """
    epsilon = task.options["epsilon"]
    sources = fisher_sources(task)
    weights = task.weights.copy()
    if task.options["normalize"]:
        norms = np.array([math.sqrt(_sum_of_squares(source)) for source in sources])
        weights = weights / (norms + epsilon)[:, None]
        weights = weights / weights.sum(axis=0)
    starts = span_starts(task.spans)
    coefficients = weights.astype(np.float32)

    def kernel(lo: int, hi: int, out: FloatVector, scratch: Scratch) -> None:
        row, value = scratch.get("row", hi - lo), scratch.get("fisher", hi - lo)
        divisor = scratch.get("divisor", hi - lo)
        out[:] = 0
        divisor[:] = 0
        for i, source in enumerate(task.sources):
            sources[i].read(lo, hi, value)
            value += np.float32(epsilon)
            for span, a, b in cut(task.spans, starts, lo, hi):
                value[a - lo : b - lo] *= coefficients[i, span]
            divisor += value
            source.read(lo, hi, row)
            row *= value
            out += row
        np.divide(out, divisor, out=out)
        for span, a, b in cut(task.spans, starts, lo, hi):
            if task.scaling[span] != 1:
                out[a - lo : b - lo] *= np.float32(task.scaling[span])

    return kernel


def fisher_sources(task: MergeTask) -> list[DeltaSource]:
    """Lay each model's Fisher values out; raises `MergeError` for a wrong one."""
    if len(task.statistics) != task.count:
        raise MergeError(
            f"fisher needs a statistics file for each of the {task.count} models, "
            f"{len(task.statistics)} are given; make them with dare-agg statistics"
        )
    laid: list[DeltaSource] = []
    for number, values in enumerate(task.statistics):
        if isinstance(values, DeltaSource):
            if values.size != task.layout.size:
                raise MergeError(
                    f"statistics {number} have {values.size} Fisher values, the model "
                    f"{task.layout.size} parameters; they belong to another model"
                )
            laid.append(values)
            continue
        if not any(entry.name in values for entry in task.layout.entries):
            raise MergeError(
                f"statistics {number} name no parameter of the model; make them with "
                "dare-agg statistics --kind fisher on this model"
            )
        entries: list[tuple[int, int, FloatVector | None]] = []
        for entry in task.layout.entries:
            array = values.get(entry.name)
            if array is None:
                entries.append((entry.offset, entry.stop, None))
                continue
            flat = np.asarray(array).reshape(-1)
            if array.shape != entry.shape:
                raise MergeError(
                    f"statistics {number}: {entry.name!r} has shape {array.shape}, the parameter "
                    f"{entry.shape}; they belong to another model"
                )
            low = flat.min() if flat.size else 0
            if not (low >= 0 and np.isfinite(flat.max() if flat.size else 0)):
                raise MergeError(
                    f"statistics {number}: {entry.name!r} has a negative or non-finite Fisher "
                    "value; compute it again"
                )
            entries.append((entry.offset, entry.stop, flat))
        laid.append(NamedSource(entries))
    return laid


def _sum_of_squares(source: DeltaSource) -> float:
    buffer, parts = np.empty(FIXED_BLOCK, np.float32), []
    for lo in range(0, source.size, FIXED_BLOCK):
        piece = buffer[: min(source.size, lo + FIXED_BLOCK) - lo]
        source.read(lo, lo + piece.size, piece)
        parts.append(float((piece.astype(np.float64) ** 2).sum()))
    return math.fsum(parts)
