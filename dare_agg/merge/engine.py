"""The tiled merge engine: any number of deltas of any size, in bounded memory.

Memory is O(tile × models): a tile of every delta is read, merged and written before the
next. Methods that need a global figure first (TIES: thresholds, majority sign) read the
sources once more for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from dare_agg.errors import MergeError
from dare_agg.layout import FloatVector, Layout
from dare_agg.merge.kernels import (
    Stack,
    agreeing_sum,
    agreeing_weight,
    elect_signs,
    trim_small,
    weighted_sum,
)
from dare_agg.merge.methods import find_method
from dare_agg.merge.sources import DeltaSource
from dare_agg.merge.thresholds import kth_smallest

TILE = 1 << 16


@dataclass(frozen=True)
class MergeMeasurements:
    """What a merge saw on the way.

    ``sign_conflict`` is the share of elements with at least two non-zero entries whose signs
    differ; ``touched`` the share with at least one. ``lone`` of the touched have exactly one.
    """

    models: int
    parameters: int
    touched: float
    lone: float
    sign_conflict: float
    majority_sign: int = 0


def merge_deltas(
    layout: Layout,
    sources: Sequence[DeltaSource],
    method: str,
    *,
    weights: Sequence[float] | None = None,
    scaling: float = 1.0,
    options: Mapping[str, Any] | None = None,
    tile: int = TILE,
    threads: int = 1,
    out: FloatVector | None = None,
    keep: Sequence[float] | None = None,
) -> tuple[FloatVector, MergeMeasurements]:
    """Merge deltas into one: ``scaling`` times the method's combination.

    ``weights`` default to the method's own (1/n for average, 1 otherwise); ``keep`` is each
    model's survival rate 1 − p, used by TIES with ``normalize = "expected"``. The result is
    the same for any tile size and number of threads; models are added in the given order.

    Raises `MergeError` for no model, another size or a weight that is no number.
    """
    row = find_method(method)
    settled = row.settle(options or {})
    count = len(sources)
    if not count:
        raise MergeError("no model to merge; give at least one")
    for i, source in enumerate(sources):
        if source.size != layout.size:
            raise MergeError(
                f"model {i} has {source.size} parameters, the layout {layout.size}; merge models "
                "of one architecture"
            )
    if tile < 1 or threads < 1:
        raise MergeError(f"tile = {tile}, threads = {threads}; at least 1 each")
    used = [1 / count if row.mean else 1.0] * count if weights is None else list(weights)
    if len(used) != count or not np.isfinite(used).all():
        raise MergeError(f"{len(used)} weights {used}; {count} finite numbers are needed")
    merged = np.empty(layout.size, np.float32) if out is None else out
    kernel, majority = _prepare(row.name, layout, sources, used, settled, keep, scaling, tile)
    counts = np.zeros((-(-layout.size // tile), 3), np.int64)

    def work(first: int) -> None:
        stack = np.empty((count, tile), np.float32)
        for number in range(first, counts.shape[0], threads):
            lo = number * tile
            hi = min(layout.size, lo + tile)
            tiles = stack[:, : hi - lo] if hi - lo == tile else np.empty(
                (count, hi - lo), np.float32
            )
            for source, piece in zip(sources, tiles, strict=True):
                source.read(lo, hi, piece)
            counts[number] = _agreement(tiles)
            merged[lo:hi] = kernel(tiles, lo, hi)

    if threads == 1:
        work(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    touched, lone, conflict = (int(c) for c in counts.sum(axis=0))
    return merged, MergeMeasurements(
        models=count,
        parameters=layout.size,
        touched=touched / max(1, layout.size),
        lone=lone / max(1, touched),
        sign_conflict=conflict / max(1, touched - lone),
        majority_sign=majority,
    )


Kernel = Callable[[Stack, int, int], FloatVector]


def _prepare(
    name: str,
    layout: Layout,
    sources: Sequence[DeltaSource],
    weights: list[float],
    options: Mapping[str, Any],
    keep: Sequence[float] | None,
    scaling: float,
    tile: int,
) -> tuple[Kernel, int]:
    factor = np.float32(scaling)
    if name != "ties":
        divisor = sum(weights) if options.get("normalize") else 1.0
        # Weights that cancel have no mean; their plain sum is what is left.
        used = [w / divisor for w in weights] if abs(divisor) > 1e-8 else weights
        return lambda stack, lo, hi: factor * weighted_sum(stack, used), 0
    return _prepare_ties(layout, sources, weights, options, keep, factor, tile)


def _prepare_ties(
    layout: Layout,
    sources: Sequence[DeltaSource],
    weights: list[float],
    options: Mapping[str, Any],
    keep: Sequence[float] | None,
    factor: np.float32,
    tile: int,
) -> tuple[Kernel, int]:
    trim = options["trim"]
    spans = (
        [(0, layout.size)]
        if options["trim-scope"] == "model"
        else [(entry.offset, entry.stop) for entry in layout.entries]
    )
    thresholds: list[FloatVector] = []
    if trim > 0:
        ranks = [_removed(hi - lo, trim) for lo, hi in spans]
        thresholds = [kth_smallest(source, spans, ranks, tile) for source in sources]
    bounds = np.array([lo for lo, _ in spans], np.int64)
    factors = np.array(weights, np.float32)[:, None]

    def trimmed(stack: Stack, lo: int, hi: int) -> Stack:
        for row, limits in zip(stack, thresholds, strict=False):
            at = lo
            span = int(np.searchsorted(bounds, lo, side="right")) - 1
            while at < hi:
                stop = min(hi, spans[span][1])
                trim_small(row[at - lo : stop - lo], limits[span], keep_equal=True)
                at, span = stop, span + 1
        if np.all(factors == 1):
            return stack
        return stack * factors

    expected = 1.0
    if options["normalize"] == "expected":
        rates = [1.0] * len(weights) if keep is None else keep
        expected = sum(abs(w) * rate for w, rate in zip(weights, rates, strict=True))
        # DARE has multiplied the survivors by 1/keep already; undo it in the expectation.
        expected = sum(abs(w) for w in weights)
    majority = 1
    if options["sign-tie"] == "majority":
        majority = _majority_sign(layout, sources, trimmed, tile)

    def kernel(stack: Stack, lo: int, hi: int) -> FloatVector:
        weighted = trimmed(stack, lo, hi)
        signs = elect_signs(weighted)
        signs[signs == 0] = majority
        total = agreeing_sum(weighted, signs)
        if options["normalize"] == "agreeing":
            divisor = agreeing_weight(weighted, signs, weights)
            np.divide(total, divisor, out=total, where=divisor != 0)
        elif options["normalize"] == "expected":
            total /= np.float32(expected)
        return factor * total

    return kernel, majority


def _removed(count: int, trim: float) -> int:
    """Number of the smallest entry that survives trimming, as the reference counts."""
    return min(count, int(count * trim))


def _majority_sign(
    layout: Layout,
    sources: Sequence[DeltaSource],
    trimmed: Callable[[Stack, int, int], Stack],
    tile: int,
) -> int:
    balance = 0
    for lo in range(0, layout.size, tile):
        hi = min(layout.size, lo + tile)
        stack = np.empty((len(sources), hi - lo), np.float32)
        for source, piece in zip(sources, stack, strict=True):
            source.read(lo, hi, piece)
        signs = elect_signs(trimmed(stack, lo, hi))
        balance += int(signs.sum(dtype=np.int64))
    return (balance > 0) - (balance < 0)


def _agreement(stack: Stack) -> tuple[int, int, int]:
    """Count elements with any entry, with exactly one, and with both signs."""
    positive = np.count_nonzero(stack > 0, axis=0)
    negative = np.count_nonzero(stack < 0, axis=0)
    present = positive + negative
    return (
        int(np.count_nonzero(present)),
        int(np.count_nonzero(present == 1)),
        int(np.count_nonzero((positive > 0) & (negative > 0))),
    )
