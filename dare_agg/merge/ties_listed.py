"""TIES for deltas that list their survivors: only those are touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from dare_agg.merge.majority import MajoritySign
from dare_agg.merge.task import Kernel, MergeTask, Scratch, Span, cut
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource, SparseSource, listed

_SIGN = np.uint32(1 << 31)
# Elements whose signs are elected at a time, so that they stay in the cache.
_ELECTED = 1 << 14
# Survivors of a tile, all models together, that are listed at once, and the addresses that room
# for all of a tile's elements may take; beyond, models are summed one by one, so that memory does
# not grow with them.
_AT_ONCE, _ROOM = 1 << 20, 1 << 27


def listed_consensus(
    task: MergeTask,
    spans: Sequence[Span],
    starts: NDArray[np.int64],
    weights: NDArray[np.float64],
    scaling: NDArray[np.float64],
) -> Kernel:
    """Build the kernel of `dare_agg.merge.ties.consensus` for untrimmed sparse sources."""
    factors = weights.astype(np.float32)
    tie = task.options["sign-tie"]
    majority = None
    if tie != "positive":
        majority = MajoritySign(partial(_balance, task, spans, starts, factors))
    survivors = sum(cast(SparseSource, source).survivors for source in task.sources)
    few = survivors * task.tile <= _AT_ONCE * task.layout.size and task.count * task.tile <= _ROOM
    merge = (_of_few if few else _of_many)(task, majority)
    expected = np.abs(weights).sum(axis=0)

    def kernel(lo: int, hi: int, out: FloatVector, scratch: Scratch) -> None:
        for span, a, b in cut(spans, starts, lo, hi):
            part = out[a - lo : b - lo]
            merge(a, b, factors[:, span], part, scratch)
            factor = scaling[span]
            if task.options["normalize"] == "expected":
                factor /= expected[span] or 1.0
            if factor != 1:
                part *= np.float32(factor)

    return kernel


# Writes the unscaled consensus of [a, b) for the models' factors into out.
_Merge = Callable[[int, int, NDArray[np.float32], FloatVector, Scratch], None]


def _of_few(task: MergeTask, majority: MajoritySign | None) -> _Merge:
    """All models' survivors are listed, then looked at together."""
    normalize, tie = task.options["normalize"], task.options["sign-tie"]

    def merge(
        a: int, b: int, factors: NDArray[np.float32], out: FloatVector, scratch: Scratch
    ) -> None:
        sums = scratch.get("sums", b - a)
        out[:] = 0
        sums[:] = 0
        at, values, lengths = _survivors(task, factors, a, b, scratch)
        np.add.at(sums, at, values)
        elected = sums.take(at, out=scratch.get("elected", at.size), mode="clip")
        if majority is not None:
            tied = elected == 0
            tied &= values != 0
            if tied.any():
                sign = majority.sign()
                elected[tied] = 1 if sign > 0 else -1
                if sign == 0 and (tie == "majority" or normalize == "max"):
                    values[tied] = 0
        # Flipped by the elected sign, what agrees is positive; zeros add and count nothing.
        flips, bits = elected.view(np.uint32), values.view(np.uint32)
        flips &= _SIGN
        bits ^= flips
        np.maximum(values, 0, out=values)
        if normalize == "agreeing":
            counts = scratch.get("counts", b - a)
            counts[at] = 0
            np.add.at(counts, at, (values > 0) * np.repeat(factors, lengths))
        if normalize == "max":
            np.maximum.at(out, at, values)
            out.view(np.uint32)[at] |= flips
            out += 0  # no negative zero
        else:
            bits ^= flips
            np.add.at(out, at, values)
        if normalize == "agreeing":
            shares = counts.take(at)
            shares[np.abs(shares) < 1e-8] = 1
            out[at] = out.take(at) / shares

    return merge


def _survivors(
    task: MergeTask, factors: NDArray[np.float32], a: int, b: int, scratch: Scratch
) -> tuple[NDArray[np.int64], FloatVector, list[int]]:
    """All models' survivors in [a, b), one model after the other, in ``scratch``.

    Returns their positions from ``a`` on, their weighted values, and how many each model has.
    """
    # Room for everything, of which only what is used becomes memory.
    at = scratch.get("at", task.count * (b - a), np.int64)
    values = scratch.get("values", task.count * (b - a))
    used, lengths = 0, []
    for source, factor in zip(task.sources, factors, strict=True):
        before = used
        for positions, piece in listed(source, a, b):
            stop = used + positions.size
            np.subtract(positions, a, out=at[used:stop])
            np.multiply(piece, factor, out=values[used:stop])
            used = stop
        lengths.append(used - before)
    return at[:used], values[:used], lengths


def _of_many(task: MergeTask, majority: MajoritySign | None) -> _Merge:
    """What is positive and what is negative are summed apart, until all models have spoken."""
    normalize, tie = task.options["normalize"], task.options["sign-tie"]
    counted = normalize == "agreeing"
    gather = np.maximum if normalize == "max" else np.add

    def merge(
        a: int, b: int, factors: NDArray[np.float32], out: FloatVector, scratch: Scratch
    ) -> None:
        size = b - a
        sums = scratch.get("sums", size)
        # The second half is for negative values.
        sides = scratch.get("sides", 2 * size)
        counts = scratch.get("counts", 2 * size if counted else 0)
        for vector in (sums, sides, counts):
            vector[:] = 0
        for source, factor in zip(task.sources, factors, strict=True):
            for at, values in _weighted(source, factor, a, b, scratch):
                np.add.at(sums, at, values)
                below = np.less(values, 0, out=scratch.get("below", at.size, np.bool_))
                at += np.multiply(below, size, out=scratch.get("shift", at.size, np.int64))
                gather.at(sides, at, np.abs(values, out=values))
                if counted:
                    np.add.at(counts, at, (values > 0) * factor)
        for first in range(0, size, _ELECTED):
            part = slice(first, min(size, first + _ELECTED))
            positive, negative = (half[part] for half in sides.reshape(2, -1))
            below = elect(sums[part], positive)
            out[part] = positive
            np.copyto(out[part], np.negative(negative, out=negative), where=below)
            if counted:
                shares, others = (half[part] for half in counts.reshape(2, -1))
                np.copyto(shares, others, where=below)
                # Weights that cancel, and elements nobody speaks for, are not divided.
                shares[np.abs(shares) < 1e-8] = 1
                out[part] /= shares

    def elect(sums: FloatVector, positive: FloatVector) -> NDArray[np.bool_]:
        """Return where the sign is negative, which is where the sums are or ties make it so."""
        below = sums < 0
        if majority is not None:
            # Where no entry is positive, a sum of 0 is one of zeros.
            tied = positive > 0
            tied &= sums == 0
            if tied.any():
                sign = majority.sign()
                if sign == 0 and (tie == "majority" or normalize == "max"):
                    positive[tied] = 0
                elif sign <= 0:
                    below |= tied
        return below

    return merge


def _weighted(
    source: DeltaSource, factor: np.float32, a: int, b: int, scratch: Scratch
) -> Iterator[tuple[NDArray[np.int64], FloatVector]]:
    """Survivors in [a, b), their positions from ``a`` on and weighted values, in ``scratch``."""
    for positions, values in listed(source, a, b):
        at = scratch.get("at", positions.size, np.int64)
        weighted = scratch.get("weighted", positions.size)
        yield np.subtract(positions, a, out=at), np.multiply(values, factor, out=weighted)


def _balance(
    task: MergeTask,
    spans: Sequence[Span],
    starts: NDArray[np.int64],
    factors: NDArray[np.float32],
) -> int:
    scratch, balance = Scratch(), 0
    for lo, hi in task.tiles():
        for span, a, b in cut(spans, starts, lo, hi):
            sums = scratch.get("sums", b - a)
            sums[:] = 0
            for source, factor in zip(task.sources, factors[:, span], strict=True):
                for at, values in _weighted(source, factor, a, b, scratch):
                    np.add.at(sums, at, values)
            balance += int(np.count_nonzero(sums > 0)) - int(np.count_nonzero(sums < 0))
    return balance
