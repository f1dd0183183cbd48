"""TIES: trim, elect signs, merge what agrees (arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError
from dare_agg.merge.majority import MajoritySign
from dare_agg.merge.norms import norm_ratios, ratio, span_norm
from dare_agg.merge.selection import SelectedSource, select
from dare_agg.merge.task import Kernel, MergeTask, Scratch, Span, cut, span_starts
from dare_agg.merge.thresholds import kth_smallest_of_each
from dare_agg.merge.ties_listed import listed_consensus
from dare_agg.vectors.layout import FloatVector

# The least |x| that stays, (models, spans). None keeps all.
Bounds = NDArray[np.float32]


def ties(task: MergeTask) -> Kernel:
    """λ·(elected sum of the trimmed, weighted deltas) / what ``normalize`` says.

    Raises `ConfigError` where both trim and density are given.
    """
    options = task.options
    per_tensor = options["trim-scope"] == "tensor"
    spans = task.tensor_spans if per_tensor or len(task.spans) > 1 else task.spans
    scope = task.tensor_spans if per_tensor else ((0, task.layout.size),)
    if options["density"] is not None:
        if options["trim"] is not None:
            raise ConfigError("trim and density are both given; density is 1 - trim: give one")
        kept = _counts(task, "density", scope, _kept)
        return _of_counted(task, spans, scope, kept)
    if options["trim"] is not None:
        kept = _counts(task, "trim", scope, _reference_kept)
    else:
        kept = [[_reference_kept(hi - lo, 0.8) for lo, hi in scope]] * task.count
    bounds = _trim_bounds(task, scope, kept)
    factors = None
    if options["rescale"] != "none" and bounds is not None:
        factors = _norm_factors(task, scope, bounds, options["rescale"])
    if len(spans) > len(scope):
        # One threshold a model for spans that differ in weight only.
        bounds = None if bounds is None else np.repeat(bounds, len(spans), axis=1)
        factors = None if factors is None else np.repeat(factors, len(spans), axis=1)
    return consensus(task, spans, bounds, factors)


def _of_counted(
    task: MergeTask, spans: Sequence[Span], scope: Sequence[Span], kept: list[list[int]]
) -> Kernel:
    """TIES of the largest entries, as many of each model as ``kept`` says."""
    sizes = [hi - lo for lo, hi in scope]
    ranks = [[(n - k, n) for n, k in zip(sizes, row, strict=True)] for row in kept]
    if all(first == 0 for row in ranks for first, _ in row):
        return consensus(task, spans, None)
    left, factors = selected(task, scope, ranks, task.options["rescale"])
    if factors is not None and len(spans) > len(scope):
        factors = np.repeat(factors, len(spans), axis=1)
    return consensus(left, spans, None, factors)


def selected(
    task: MergeTask,
    scope: Sequence[Span],
    ranks: list[list[tuple[int, int]]],
    norm: str,
    *,
    later_is_larger: bool = False,
) -> tuple[MergeTask, NDArray[np.float32] | None]:
    """The task with the entries of these ranks by \\|x\\| only (models, spans), and the factors
    that restore each model's ``norm`` in each span."""
    sources = tuple(
        SelectedSource(
            source, select(source, scope, row, task.tile, later_is_larger=later_is_larger)
        )
        for source, row in zip(task.sources, ranks, strict=True)
    )
    left = replace(task, sources=sources)
    if norm == "none":
        return left, None
    pairs = zip(task.sources, sources, strict=True)
    return left, np.stack([norm_ratios(whole, rest, scope, norm) for whole, rest in pairs])


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
    return low


def consensus(
    task: MergeTask,
    spans: Sequence[Span],
    bounds: Bounds | None,
    factors: NDArray[np.float32] | None = None,
    *,
    weights: NDArray[np.float64] | None = None,
) -> Kernel:
    """Build the kernel that elects signs and merges, for deltas of at least ``bounds``.

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
    if tie == "positive":
        # What cancels is decided by the products' rounding, as in mergekit; by 2^k none is rounded.
        equal &= np.frexp(multipliers[0])[0] == 0.5
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


def _at(bounds: Bounds | None, span: int) -> NDArray[np.float32] | None:
    return None if bounds is None else bounds[:, span]


def _trim_and_sum(
    part: NDArray[np.float32],
    limits: NDArray[np.float32] | None,
    multipliers: NDArray[np.float32] | None,
    total: FloatVector,
    scratch: Scratch,
) -> None:
    """Trim and weight the rows in place and write their sum."""
    size = total.size
    magnitude, keep = scratch.get("magnitude", size), scratch.get("keep", size, np.bool_)
    for i, row in enumerate(part):
        if limits is not None and limits[i] >= 0:
            np.abs(row, out=magnitude)
            np.greater_equal(magnitude, limits[i], out=keep)
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


def _norm_factors(
    task: MergeTask, spans: Sequence[Span], bounds: Bounds, norm: str
) -> NDArray[np.float32]:
    """‖δ‖ / ‖trimmed δ‖ for each model and span."""
    factors = np.ones((task.count, len(spans)), np.float32)
    for model, source in enumerate(task.sources):
        for number, span in enumerate(spans):
            left = span_norm(source, span, norm, float(bounds[model, number]))
            factors[model, number] = ratio(span_norm(source, span, norm), left)
    return factors
