"""breadcrumbs, SCE and DELLA: which entries of a tensor speak, and how loud."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import Keystream, derive_key, seed_secret
from dare_agg.errors import ConfigError
from dare_agg.merge.linear import normalized, weighted_sum
from dare_agg.merge.norms import norm_ratios
from dare_agg.merge.selection import Selection, select
from dare_agg.merge.task import FIXED_BLOCK, Kernel, MergeTask, Scratch, cut, span_starts
from dare_agg.merge.ties import consensus, selected
from dare_agg.merge.wrapped import ScaledSource
from dare_agg.vectors.layout import Entry, FloatVector
from dare_agg.vectors.sources import DeltaSource


def breadcrumbs(task: MergeTask) -> Kernel:
    """Drop the top ``gamma`` of each tensor, keep the next ``density`` (arXiv 2312.06795).

    With ``sign-consensus`` the rest is merged as TIES does.
    """
    spans = task.tensor_spans
    sizes = [hi - lo for lo, hi in spans]
    densities, gammas = task.numbers("density"), task.numbers("gamma")
    ranks = [
        [
            _band(size, float(density), float(gamma))
            for size, density, gamma in zip(sizes, densities[i], gammas[i], strict=True)
        ]
        for i in range(task.count)
    ]
    # mergekit sorts from the smallest up here, from the largest down in ties.
    rescale = task.options["rescale"]
    left, factors = selected(task, spans, ranks, rescale, later_is_larger=True)
    if task.options["sign-consensus"]:
        return consensus(left, spans, None, factors)
    weights = task.values_at(task.weights, spans)
    if task.options["normalize"] == "agreeing":
        weights = normalized(weights)
    if factors is not None:
        weights = weights * factors
    return weighted_sum(left, weights * _scaling(task), None, spans)


def _band(size: int, density: float, gamma: float) -> tuple[int, int]:
    """The ranks that stay, by ascending magnitude: the top gives way where it would leave less
    than the density."""
    if density >= 1:
        return 0, size
    kept = int(density * size)
    bottom = max(0, size - kept - int(gamma * size))
    return bottom, bottom + kept


def _scaling(task: MergeTask) -> NDArray[np.float64]:
    return task.values_at(task.scaling, task.tensor_spans)


class _Variance:
    """Variance over the models of each element, as a source."""

    def __init__(self, task: MergeTask) -> None:
        self._task = task

    @property
    def size(self) -> int:
        return self._task.layout.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        stack = np.empty((self._task.count, hi - lo), np.float32)
        for source, row in zip(self._task.sources, stack, strict=True):
            source.read(lo, hi, row)
        variance(stack, out)


def variance(stack: NDArray[np.float32], out: FloatVector) -> None:
    """Variance (over n) of each column, rounded once: equal ones stay equal."""
    exact = stack.astype(np.float64)
    exact -= exact.mean(axis=0)
    exact *= exact
    out[:] = exact.mean(axis=0)


def sce(task: MergeTask) -> Kernel:
    """Select the elements of largest variance, weigh models by their mean δ² in each tensor,
    erase minority signs (arXiv 2408.07990)."""
    spans, topk = task.tensor_spans, task.shared("select-topk")
    chosen = _most_varied(task, topk) if (topk < 1).any() else None
    energy = np.zeros((task.count, len(spans)))
    stack = np.empty((task.count, FIXED_BLOCK), np.float32)
    buffer = np.empty(FIXED_BLOCK, np.float32)
    for number, (start, stop) in enumerate(spans):
        parts = []
        for lo in range(start, stop, FIXED_BLOCK):
            hi = min(stop, lo + FIXED_BLOCK)
            tile = stack[:, : hi - lo]
            for source, row in zip(task.sources, tile, strict=True):
                source.read(lo, hi, row)
            if chosen is not None:
                variance(tile, buffer[: hi - lo])
                tile *= chosen.keeps(buffer[: hi - lo], lo)
            parts.append((tile.astype(np.float64) ** 2).sum(axis=1))
        energy[:, number] = [math.fsum(p[i] for p in parts) for i in range(task.count)]
        energy[:, number] /= stop - start
    total = energy.sum(axis=0)
    # mergekit gives equal weights below a sum of 1e-6, which real deltas undercut; here only
    # where nothing is left, unless it is asked for.
    speaks = (total > 0) & (total >= task.options["least-energy"])
    weights = np.where(speaks, energy / np.where(speaks, total, 1), 1 / task.count)
    return _sce_kernel(task, weights, chosen)


def _most_varied(task: MergeTask, shares: NDArray[np.float64]) -> Selection:
    """Of each tensor the share of the elements that vary at all, by variance."""
    spread, ranks = _Variance(task), []
    buffer = np.empty(FIXED_BLOCK, np.float32)
    for (start, stop), share in zip(task.tensor_spans, shares, strict=True):
        nonzero = 0
        for lo in range(start, stop, FIXED_BLOCK):
            row = buffer[: min(stop, lo + FIXED_BLOCK) - lo]
            spread.read(lo, lo + row.size, row)
            nonzero += int(np.count_nonzero(row))
        size = stop - start
        ranks.append((0 if share >= 1 else size - int(nonzero * float(share)), size))
    return select(spread, task.tensor_spans, ranks, task.tile)


def _sce_kernel(task: MergeTask, weights: NDArray[np.float64], chosen: Selection | None) -> Kernel:
    """Signs come from the unweighted deltas, sums are weighted: not quite `consensus`."""
    spans, scaling = task.tensor_spans, _scaling(task)
    starts = span_starts(spans)
    shares = weights.astype(np.float32)

    def kernel(lo: int, hi: int, out: FloatVector, scratch: Scratch) -> None:
        stack = scratch.get("stack", task.count * (hi - lo)).reshape(task.count, hi - lo)
        for source, row in zip(task.sources, stack, strict=True):
            source.read(lo, hi, row)
        if chosen is not None:
            spread = scratch.get("spread", hi - lo)
            variance(stack, spread)
            stack *= chosen.keeps(spread, lo)
        for span, a, b in cut(spans, starts, lo, hi):
            part = stack[:, a - lo : b - lo]
            total = part[0].copy()
            for row in part[1:]:
                total += row
            plus = total >= 0
            divisor = np.zeros(b - a, np.float32)
            total[:] = 0
            for row, share in zip(part, shares[:, span], strict=True):
                agree = ((row > 0) == plus) & (row != 0)
                total += row * agree * share
                divisor += agree * share
            total /= np.maximum(divisor, np.float32(1e-6))
            out[a - lo : b - lo] = total * np.float32(scaling[span])

    return kernel


def della(task: MergeTask) -> Kernel:
    """Drop at random, less likely the larger: in each row, an entry of magnitude rank r of w
    is kept with density − ε + 2ε·r/(w−1) (arXiv 2406.11617).

    ``rescale`` "keep" divides by that probability (the paper), "l1" restores the L1 norm of
    the tensor (mergekit), "none" leaves the entries.

    Raises `ConfigError` unless density ± epsilon lies inside (0, 1).
    """
    rescale = task.options["rescale"]
    densities, epsilons = task.numbers("density"), task.numbers("epsilon")
    for density, epsilon in zip(densities.flat, epsilons.flat, strict=True):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            raise ConfigError(
                f"density {density:g} with epsilon {epsilon:g}: density ± epsilon must lie inside "
                f"(0, 1); give epsilon < {min(density, 1 - density):g}"
            )
    secret = seed_secret(task.options["seed"])
    keys = task.options.get("keys") or [derive_key(secret, "della", i) for i in range(task.count)]
    sources: tuple[DeltaSource, ...] = tuple(
        source
        if (densities[i] >= 1).all()
        else _DellaSource(task, source, densities[i], epsilons[i], keys[i], rescale)
        for i, source in enumerate(task.sources)
    )
    dropped = replace(task, sources=sources)
    if rescale == "l1":
        spans = task.tensor_spans
        scaled = tuple(
            ScaledSource(left, spans, norm_ratios(whole, left, spans, "l1"))
            for whole, left in zip(task.sources, sources, strict=True)
        )
        dropped = replace(task, sources=scaled)
    if task.options["sign-consensus"]:
        return consensus(dropped, task.spans, None)
    weights = task.weights
    if task.options["normalize"] == "agreeing":
        weights = normalized(weights)
    return weighted_sum(dropped, weights * task.scaling)


class _DellaSource:
    """A delta after DELLA's dropping, computed row by row, the same in any tiles."""

    def __init__(
        self,
        task: MergeTask,
        source: DeltaSource,
        densities: NDArray[np.float64],
        epsilons: NDArray[np.float64],
        key: bytes,
        rescale: str,
    ) -> None:
        self._layout, self._source, self._key, self._rescale = task.layout, source, key, rescale
        filled = (entry.name for entry in task.layout.entries if entry.size)
        self._shares = dict(zip(filled, zip(densities, epsilons, strict=True), strict=True))

    @property
    def size(self) -> int:
        return self._source.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        for entry, first, last in self._layout.pieces(lo, hi):
            density, epsilon = self._shares[entry.name]
            if density >= 1 or density <= 0:
                a, b = entry.offset + first, entry.offset + last
                self._source.read(a, b, out[a - lo : b - lo])
                out[a - lo : b - lo] *= density >= 1
                continue
            width = _row_width(entry)
            at = entry.offset + first - first % width
            while at < entry.offset + last:
                # Whole rows, as many as lie in one go of about 2^16 elements.
                count = max(1, FIXED_BLOCK // width)
                stop = min(entry.stop, at + count * width)
                rows = self._rows(at, stop, width, float(density), float(epsilon))
                a, b = max(at, lo), min(stop, hi)
                out[a - lo : b - lo] = rows[a - at : b - at]
                at = stop

    def _rows(self, lo: int, hi: int, width: int, density: float, epsilon: float) -> FloatVector:
        values = np.empty(hi - lo, np.float32)
        self._source.read(lo, hi, values)
        # Magnitude, then place: equal ones keep their order, and whole numbers sort fast.
        keys = np.abs(values).view(np.uint32).astype(np.uint64)
        keys <<= np.uint64(32)
        keys |= np.arange(hi - lo, dtype=np.uint64)
        order = np.sort(keys.reshape(-1, width), axis=1).reshape(-1)
        order &= np.uint64(0xFFFFFFFF)
        places = order.view(np.int64)
        count = (hi - lo) // width
        keep = density - epsilon + 2 * epsilon * np.arange(width) / max(1, width - 1)
        threshold = np.empty(hi - lo, np.uint64)
        threshold[places] = np.tile((keep * 2.0**32).astype(np.uint64), count)
        values *= Keystream(self._key).words(lo, hi - lo) < threshold
        if self._rescale == "keep":
            shares = np.empty(hi - lo, np.float32)
            shares[places] = np.tile(keep.astype(np.float32), count)
            values /= shares
        return values


def _row_width(entry: Entry) -> int:
    return max(1, math.prod(entry.shape[1:]) if len(entry.shape) > 1 else entry.size)
