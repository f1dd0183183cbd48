"""Diagnosis of deltas: is the base the right one, are they small enough for DARE.

DARE (arXiv 2311.03099, section 4.4) works while almost all \\|δ\\| stay below 0.005, as after
fine-tuning from the same base; where \\|δ\\| > 0.01 is common, p = 0.1 already destroys the
model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.sources import SAFE_DELTA, DeltaSource, take

LARGE = 0.01
QUANTILES = (0.5, 0.9, 0.99, 0.999)
DROP_RATES = (0.5, 0.7, 0.9, 0.95, 0.99, 0.995, 0.999)
# Elements of a tile, and at most of all models' tiles together.
_BLOCK, _IN_ALL, _SMALLEST_BLOCK = 1 << 16, 1 << 18, 1 << 12
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class TensorDiagnosis:
    """One tensor over all models: quantiles of \\|δ\\| (worst model), rms, share not small."""

    name: str
    size: int
    quantiles: tuple[float, ...]
    rms: float
    above: float


@dataclass(frozen=True)
class ModelDiagnosis:
    """One delta. Quantiles of \\|δ\\| are from an even sample of at most 65,536 elements of
    each tensor; everything else counts every element."""

    name: str
    norm: float
    rms: float
    largest: float
    above_small: float
    above_large: float
    zeros: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose_deltas` found.

    ``cosine`` and ``conflict`` are (models, models): cosine of two deltas, and the share of
    elements both change on which their signs differ. ``survivors`` gives n(1−p) for some
    drop rates. ``safe_drop_rate`` is 0 where DARE is unsafe; ``why`` says what decided.
    """

    parameters: int
    models: tuple[ModelDiagnosis, ...]
    tensors: tuple[TensorDiagnosis, ...]
    cosine: tuple[tuple[float, ...], ...]
    conflict: tuple[tuple[float, ...], ...]
    survivors: dict[str, float]
    safe_drop_rate: float
    why: str
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "parameters": self.parameters,
            "safe_drop_rate": self.safe_drop_rate,
            "why": self.why,
            "warnings": list(self.warnings),
            "models": [vars(m) | {"quantiles": _named(m.quantiles)} for m in self.models],
            "cosine": [list(row) for row in self.cosine],
            "sign_conflict": [list(row) for row in self.conflict],
            "survivors_per_element": self.survivors,
            "tensors": [vars(t) | {"quantiles": _named(t.quantiles)} for t in self.tensors],
        }


def _named(quantiles: Sequence[float]) -> dict[str, float]:
    return {f"{q:g}": value for q, value in zip(QUANTILES, quantiles, strict=True)}


def diagnose_deltas(
    layout: Layout,
    sources: Sequence[DeltaSource],
    *,
    names: Sequence[str] | None = None,
    tile: int | None = None,
) -> Diagnosis:
    """Measure deltas over a layout, one pass in bounded memory.

    ``names`` label the models in messages. Sums are taken tensor by tensor in float64.
    """
    count = len(sources)
    tile = tile or max(_SMALLEST_BLOCK, min(_BLOCK, _IN_ALL // max(1, count)))
    labels = tuple(names) if names is not None else tuple(f"model {i}" for i in range(count))
    gram = np.zeros((count, count))
    both = np.zeros((count, count), np.int64)
    differ = np.zeros((count, count), np.int64)
    above = np.zeros((count, 2), np.int64)
    zeros = np.zeros(count, np.int64)
    largest = np.zeros(count)
    tensors, pools = [], [_Pool() for _ in range(count)]
    stack = np.empty((count, tile), np.float32)
    for entry in layout.entries:
        if not entry.size:
            continue
        squares, small = np.zeros(count), np.zeros(count, np.int64)
        for lo in range(entry.offset, entry.stop, tile):
            hi = min(entry.stop, lo + tile)
            rows = stack[:, : hi - lo]
            for source, row in zip(sources, rows, strict=True):
                source.read(lo, hi, row)
            wide = rows.astype(np.float64)
            signs = np.sign(rows).astype(np.int8)
            for i in range(count):
                size = np.abs(rows[i])
                over = int(np.count_nonzero(size > SAFE_DELTA))
                small[i] += over
                above[i] += over, int(np.count_nonzero(size > LARGE))
                zeros[i] += size.size - int(np.count_nonzero(size))
                largest[i] = max(largest[i], float(size.max()))
                for j in range(i, count):
                    product = float(wide[i] @ wide[j])
                    gram[i, j] += product
                    if i == j:
                        squares[i] += product
                        continue
                    gram[j, i] += product
                    signed = signs[i] * signs[j]
                    both[i, j] += int(np.count_nonzero(signed))
                    differ[i, j] += int(np.count_nonzero(signed < 0))
        sample = _sample_positions(entry.offset, entry.stop)
        found = []
        for source, pool in zip(sources, pools, strict=True):
            sizes = np.sort(np.abs(take(source, sample)))
            pool.add(sizes, entry.size)
            found.append([float(sizes[_rank(q, sizes.size)]) for q in QUANTILES])
        tensors.append(
            TensorDiagnosis(
                entry.name,
                entry.size,
                tuple(max(column) for column in zip(*found, strict=True)),
                math.sqrt(float(squares.max()) / entry.size),
                float(small.max()) / entry.size,
            )
        )
    size = max(1, layout.size)
    models = tuple(
        ModelDiagnosis(
            labels[i],
            math.sqrt(gram[i, i]),
            math.sqrt(gram[i, i] / size),
            largest[i].item(),
            above[i, 0].item() / size,
            above[i, 1].item() / size,
            zeros[i].item() / size,
            pools[i].quantiles(),
        )
        for i in range(count)
    )
    rate, why = safe_drop_rate(models, layout.size)
    return Diagnosis(
        layout.size,
        models,
        tuple(tensors),
        _cosines(gram),
        _conflicts(both, differ),
        {f"{p:g}": round(count * (1 - p), 12) for p in DROP_RATES},
        rate,
        why,
        tuple(_warnings(models, gram)),
    )


def safe_drop_rate(models: Sequence[ModelDiagnosis], parameters: int) -> tuple[float, str]:
    """Return the drop rate that looks safe for all models, and what decided.

    The paper's experience as a rule of thumb on the worst model's 99 % quantile of \\|δ\\|.
    """
    if not models:
        return 0.0, "no model was given"
    worst = max(models, key=lambda m: m.quantiles[2])
    bound = worst.quantiles[2]
    text = f"99 % of |delta| of {worst.name} lie below {bound:.2g}"
    if bound > LARGE:
        return 0.0, f"{text}, above {LARGE}: even p = 0.1 is known to fail; check the base"
    if bound > SAFE_DELTA:
        return 0.5, f"{text}, above {SAFE_DELTA}: DARE loses accuracy early; try 0.5 and measure"
    if parameters < 10_000_000 or bound > SAFE_DELTA / 2.5:
        return 0.9, f"{text} ({parameters:,} parameters): 0.9 is safe, 0.99 may cost accuracy"
    return 0.99, f"{text}, at most {SAFE_DELTA / 2.5:g}: 0.99 is usually safe"


def _warnings(models: Sequence[ModelDiagnosis], gram: NDArray[np.float64]) -> list[str]:
    found = []
    for model in models:
        if model.norm == 0:
            found.append(f"{model.name} equals the base: it adds nothing")
        elif model.above_small > 0.01:
            found.append(
                f"{model.name}: {model.above_small:.1%} of |delta| exceed {SAFE_DELTA}; DARE is "
                "unsafe there: use another base, a lower drop rate, or no DARE"
            )
    if len(models) > 1:
        squares = np.diagonal(gram)
        pairs = [(i, j) for i in range(len(models)) for j in range(i + 1, len(models))]
        # ‖δ_i − δ_j‖² against the smaller of the two: two independent tunings give 2.
        between = [
            (squares[i] + squares[j] - 2 * gram[i, j]) / max(min(squares[i], squares[j]), 1e-300)
            for i, j in pairs
        ]
        if max(between) < 0.5 and min(squares) > 0:
            found.append(
                "the models are nearer to each other than to BASE: they were tuned from another "
                "base (a descendant of this one); name that as BASE, or the models' average if "
                "it is unknown"
            )
    return found


def _cosines(gram: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    norms = np.sqrt(np.diagonal(gram))
    scale = np.outer(norms, norms)
    cosine = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    return tuple(tuple(float(c) for c in row) for row in cosine)


def _conflicts(both: NDArray[np.int64], differ: NDArray[np.int64]) -> tuple[tuple[float, ...], ...]:
    share = differ / np.maximum(both, 1)
    return tuple(tuple(float(c) for c in row) for row in share + share.T)


def _sample_positions(start: int, stop: int) -> NDArray[np.int64]:
    size = stop - start
    if size <= _SAMPLE:
        return np.arange(start, stop, dtype=np.int64)
    return start + np.arange(_SAMPLE, dtype=np.int64) * size // _SAMPLE


def _rank(quantile: float, size: int) -> int:
    return min(size - 1, math.ceil(quantile * size) - 1)


class _Pool:
    """Samples of unlike tensors, each standing for as many elements as its tensor has."""

    def __init__(self) -> None:
        self._values: list[FloatVector] = []
        self._shares: list[float] = []

    def add(self, ordered: FloatVector, size: int) -> None:
        # A few hundred order statistics of a tensor carry its distribution.
        picked = ordered[np.linspace(0, ordered.size - 1, min(ordered.size, 2001)).astype(np.int64)]
        self._values.append(picked)
        self._shares.append(size / picked.size)

    def quantiles(self) -> tuple[float, ...]:
        if not self._values:
            return tuple(0.0 for _ in QUANTILES)
        values = np.concatenate(self._values)
        weights = np.concatenate(
            [np.full(v.size, s) for v, s in zip(self._values, self._shares, strict=True)]
        )
        order = np.argsort(values, kind="stable")
        reached = np.cumsum(weights[order])
        return tuple(
            float(
                values[order[min(values.size - 1, int(np.searchsorted(reached, q * reached[-1])))]]
            )
            for q in QUANTILES
        )
