"""TIES: trim, elect signs, merge what agrees (arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError
from dare_agg.merge.majority import MajoritySign
from dare_agg.merge.norms import ratio, span_norm
from dare_agg.merge.task import Kernel, MergeTask, Scratch, Span, cut, span_starts
from dare_agg.merge.thresholds import kth_smallest_of_each
from dare_agg.merge.ties_listed import listed_consensus
from dare_agg.vectors.layout import FloatVector

# Bounds for |x| per (model, span): what lies in [low, high] stays. None keeps all.
Bounds = tuple[NDArray[np.float32], NDArray[np.float32]]


def ties(task: MergeTask) -> Kernel:
    """λ·(elected sum of the trimmed, weighted deltas) / what ``normalize`` says.

    Raises `ConfigError` where both trim and density are given.
    """
    options = task.options
    per_tensor = options["trim-scope"] == "tensor"
    spans = task.tensor_spans if per_tensor or len(task.spans) > 1 else task.spans
    scope = task.tensor_spans if per_tensor else ((0, task.layout.size),)
    kept = None
    if options["density"] is not None:
        if options["trim"] is not None:
            raise ConfigError("trim and density are both given; density is 1 - trim: give one")
        kept = _counts(task, "density", scope, _kept)
    elif options["trim"] is not None:
        kept = _counts(task, "trim", scope, _reference_kept)
    else:
        kept = [[_reference_kept(hi - lo, 0.8) for lo, hi in scope]] * task.count
    bounds = _trim_bounds(task, scope, kept)
    factors = None
    if options["rescale"] != "none" and bounds is not None:
        factors = norm_factors(task, scope, bounds, options["rescale"])
    if len(spans) > len(scope) and bounds is not None:
        # One threshold a model for spans that differ in weight only.
        bounds = tuple(np.repeat(b, len(spans), axis=1) for b in bounds)  # type: ignore[assignment]
        factors = None if factors is None else np.repeat(factors, len(spans), axis=1)
    return consensus(task, spans, bounds, factors)


def _counts(
    task: MergeTask, option: str, scope: Sequence[Span], count: Callable[[int, float], int]
) -> list[list[int]]:
    """How many entries each model keeps in each span; raises `ConfigError` for values by tensor
    where the rank is over the whole model."""
    if task.options["trim-scope"] == "tensor":
        shares = task.numbers(option)
    elif isinstance(task.options[option], np.ndarray):
        raise ConfigError(
            f"{option} differs from tensor to tensor, but entries are ranked over the whole model; "
            "add --option trim-scope=tensor"
        )
    else:
        shares = np.array(task.per_model(option))[:, None]
    sizes = [hi - lo for lo, hi in scope]
    return [[count(n, float(s)) for n, s in zip(sizes, row, strict=True)] for row in shares]


def _kept(size: int, density: float) -> int:
    """mergekit's count: the top ⌊density·size⌋, at least one."""
    return size if density >= 1 else max(1, int(density * size)) if density > 0 else 0


def _reference_kept(size: int, trim: float) -> int:
    """The paper's code removes what is below the ⌊trim·size⌋-th smallest and keeps that one."""
    removed = int(size * trim)
    return size if removed == 0 else size - removed + 1


def _trim_bounds(task: MergeTask, scope: Sequence[Span], kept: list[list[int]]) -> Bounds | None:
    sizes = [hi - lo for lo, hi in scope]
    if all(k >= size for row in kept for k, size in zip(row, sizes, strict=True)):
        return None
    # Rank size + 1 does not exist: nothing is kept, by a bound no |x| reaches.
    ranks = [
        [0 if k >= size else min(size, size - k + 1) for k, size in zip(row, sizes, strict=True)]
        for row in kept
    ]
    low = kth_smallest_of_each(task.sources, scope, ranks, task.tile)
    for i, row in enumerate(kept):
        low[i, [k == 0 for k in row]] = np.inf
    return low, np.full_like(low, np.inf)


def consensus(
    task: MergeTask,
    spans: Sequence[Span],
    bounds: Bounds | None,
    factors: NDArray[np.float32] | None = None,
    *,
    weights: NDArray[np.float64] | None = None,
) -> Kernel:
    """Build the kernel that elects signs and merges, for deltas inside ``bounds``.

    ``factors`` (models, spans) multiply the deltas but do not count as weights.
    """
    starts = span_starts(spans)
    shares = task.values_at(task.weights, spans) if weights is None else weights
    scaling = task.values_at(task.scaling, spans)
    used = shares if factors is None else shares * factors
    by_count = task.options.get("elect") == "count"
    if bounds is None and factors is None and task.is_sparse and not by_count:
        return listed_consensus(task, spans, starts, shares, scaling)
    multipliers, counts = used.astype(np.float32), shares.astype(np.float32)
    normalize, tie = task.options["normalize"], task.options["sign-tie"]
    majority = None
    if tie != "positive":
        majority = MajoritySign(partial(_balance, task, spans, starts, bounds, multipliers))
    equal = np.all(multipliers == multipliers[:1], axis=0) & np.all(counts == counts[:1], axis=0)
    expected = np.abs(shares).sum(axis=0)

    def kernel(lo: int, hi: int, out: FloatVector, scratch: Scratch) -> None:
        stack = scratch.get("stack", task.count * (hi - lo)).reshape(task.count, hi - lo)
        for source, row in zip(task.sources, stack, strict=True):
            source.read(lo, hi, row)
        for span, a, b in cut(spans, starts, lo, hi):
            part = stack[:, a - lo : b - lo]
            total = out[a - lo : b - lo]
            # Equal weights change neither signs nor means: they are applied at the end.
            alike = bool(equal[span]) and multipliers[0, span] > 0 and task.count < 256
            own = None if alike else multipliers[:, span]
            _trim_and_sum(part, _at(bounds, span), own, total, scratch)
            if by_count:
                total[:] = np.sign(part).sum(axis=0)
            _elected(part, total, counts[:, span], normalize, alike, tie, majority, scratch)
            factor = scaling[span]
            if normalize == "expected":
                factor /= expected[span] or 1.0
            if alike and normalize != "agreeing":
                factor *= float(multipliers[0, span])
            elif alike:
                factor *= float(multipliers[0, span]) / float(counts[0, span])
            if factor != 1:
                total *= np.float32(factor)

    return kernel


def _at(bounds: Bounds | None, span: int) -> tuple[NDArray, NDArray] | None:
    return None if bounds is None else (bounds[0][:, span], bounds[1][:, span])


def _trim_and_sum(
    part: NDArray[np.float32],
    limits: tuple[NDArray, NDArray] | None,
    multipliers: NDArray[np.float32] | None,
    total: FloatVector,
    scratch: Scratch,
) -> None:
    """Trim and weight the rows in place and write their sum."""
    size = total.size
    magnitude, keep = scratch.get("magnitude", size), scratch.get("keep", size, np.bool_)
    for i, row in enumerate(part):
        if limits is not None and (limits[0][i] >= 0 or limits[1][i] < np.inf):
            np.abs(row, out=magnitude)
            np.greater_equal(magnitude, limits[0][i], out=keep)
            row *= keep
            if limits[1][i] < np.inf:
                np.less_equal(magnitude, limits[1][i], out=keep)
                row *= keep
        if multipliers is not None and multipliers[i] != 1:
            row *= multipliers[i]
        if i == 1:
            np.add(part[0], row, out=total)
        elif i:
            total += row
    if len(part) == 1:
        total[:] = part[0]


def _elected(
    part: NDArray[np.float32],
    total: FloatVector,
    weights: NDArray[np.float32],
    normalize: str,
    alike: bool,
    tie: str,
    majority: MajoritySign | None,
    scratch: Scratch,
) -> None:
    """Replace the rows' sum in ``total`` by the merge of the entries of its sign."""
    size = total.size
    plus, flag = scratch.get("plus", size, np.bool_), scratch.get("flag", size, np.bool_)
    piece = scratch.get("piece", size)
    count = scratch.get("count", size)
    np.greater_equal(total, 0, out=plus)
    undecided = None
    if majority is not None and np.count_nonzero(total) < size:
        # Where every entry is 0 the sign does not matter.
        spoken = scratch.get("spoken", size, np.bool_)
        spoken[:] = False
        for row in part:
            np.logical_or(spoken, np.not_equal(row, 0, out=flag), out=spoken)
        zeros = np.flatnonzero(np.logical_and(spoken, np.equal(total, 0, out=flag), out=spoken))
        if zeros.size:
            sign = majority.sign()
            # The largest entry takes the elected sign, so 0 makes it 0 there.
            if sign == 0 and (tie == "majority" or normalize == "max"):
                undecided = zeros
            plus[zeros] = sign > 0
    largest = normalize == "max"
    counted = normalize == "agreeing"
    speakers = scratch.get("speakers", size, np.uint8)
    total[:] = 0
    if counted:
        speakers[:] = 0
        count[:] = 0
    # Flipped by the elected sign, what agrees is positive; zeros add and count nothing.
    flips = scratch.get("flips", size, np.uint32)
    np.logical_not(plus, out=flag)
    flips[:] = flag
    np.left_shift(flips, np.uint32(31), out=flips)
    for row, weight in zip(part, weights, strict=True):
        np.bitwise_xor(row.view(np.uint32), flips, out=piece.view(np.uint32))
        np.maximum(piece, 0, out=piece)
        if largest:
            np.maximum(total, piece, out=total)
            continue
        total += piece
        if counted:
            np.greater(piece, 0, out=flag)
            if alike:
                np.add(speakers, flag.view(np.uint8), out=speakers)
            else:
                count += flag * weight
    np.bitwise_xor(total.view(np.uint32), flips, out=total.view(np.uint32))
    # No negative zero.
    total += 0
    if counted and alike:
        count[:] = np.maximum(speakers, 1, out=speakers)
        total /= count
    elif counted:
        # Weights that cancel, and elements nobody speaks for, are not divided.
        count[np.abs(count) < 1e-8] = 1
        total /= count
    if undecided is not None:
        total[undecided] = 0


def _balance(
    task: MergeTask,
    spans: Sequence[Span],
    starts: NDArray[np.int64],
    bounds: Bounds | None,
    multipliers: NDArray[np.float32],
) -> int:
    scratch, balance = Scratch(), 0
    for lo, hi in task.tiles():
        stack = scratch.get("stack", task.count * (hi - lo)).reshape(task.count, hi - lo)
        for source, row in zip(task.sources, stack, strict=True):
            source.read(lo, hi, row)
        total = scratch.get("total", hi - lo)
        for span, a, b in cut(spans, starts, lo, hi):
            piece = total[a - lo : b - lo]
            _trim_and_sum(
                stack[:, a - lo : b - lo], _at(bounds, span), multipliers[:, span], piece,
                scratch,
            )  # fmt: skip
            balance += int(np.count_nonzero(piece > 0)) - int(np.count_nonzero(piece < 0))
    return balance


def norm_factors(
    task: MergeTask, spans: Sequence[Span], bounds: Bounds, norm: str
) -> NDArray[np.float32]:
    """‖δ‖ / ‖trimmed δ‖ for each model and span."""
    factors = np.ones((task.count, len(spans)), np.float32)
    for model, source in enumerate(task.sources):
        for number, span in enumerate(spans):
            band = float(bounds[0][model, number]), float(bounds[1][model, number])
            left = span_norm(source, span, norm, band)
            factors[model, number] = ratio(span_norm(source, span, norm), left)
    return factors
