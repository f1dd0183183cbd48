"""Rescaling to an earlier norm, tensor by tensor, as mergekit does after it has dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dare_agg.merge.task import FIXED_BLOCK, Span
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource

# mergekit leaves tensors alone whose norm is below this.
_LEAST = 1e-7


def norm_ratios(
    whole: DeltaSource, left: DeltaSource, spans: Sequence[Span], norm: str
) -> FloatVector:
    """‖whole‖ / ‖left‖ for each span in the norm l1, l2 or linf; 1 where either is next to 0."""
    factors = np.ones(len(spans), np.float32)
    for number, span in enumerate(spans):
        factors[number] = ratio(span_norm(whole, span, norm), span_norm(left, span, norm))
    return factors


def ratio(before: float, after: float) -> float:
    """before / after, or 1 where either is next to 0."""
    return before / after if min(before, after) >= _LEAST else 1.0


def span_norm(source: DeltaSource, span: Span, norm: str, least: float | None = None) -> float:
    """The norm of a source's elements in a span, of those with \\|x\\| ≥ ``least`` if given."""
    parts = [0.0]
    buffer = np.empty(FIXED_BLOCK, np.float32)
    for lo in range(*span, FIXED_BLOCK):
        row = buffer[: min(span[1], lo + FIXED_BLOCK) - lo]
        source.read(lo, lo + row.size, row)
        np.abs(row, out=row)
        if least is not None:
            row *= row >= least
        if norm == "linf":
            parts.append(float(row.max()))
        elif norm == "l2":
            parts.append(float((row.astype(np.float64) ** 2).sum()))
        else:
            parts.append(float(row.sum(dtype=np.float64)))
    if norm == "linf":
        return max(parts)
    total = math.fsum(parts)
    return math.sqrt(total) if norm == "l2" else total
