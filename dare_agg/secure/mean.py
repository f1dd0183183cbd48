"""**mean**: the word is τ in two's complement, w = b + 1 + L; read as mean or sum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dare_agg.secure.aggregate import TRAILER_WORDS, Aggregate, FixedPoint, Rule, Sums, bound
from dare_agg.secure.stream import Words
from dare_agg.vectors.layout import FloatVector


def _pack(tau: NDArray[np.int64], point: FixedPoint) -> NDArray[np.int64]:
    return tau & np.int64((1 << min(point.word_bits, 62)) - 1)


def _unpack(words: Words, point: FixedPoint, parties: int) -> Sums:
    half = 1 << (point.word_bits - 1)
    total = words.astype(np.int64)
    total[total >= half] -= 2 * half
    bound(np.abs(total), parties * point.top, "sum")
    return Sums(parties, total[:-TRAILER_WORDS], int(total[-2]), int(total[-1]))


def read_mean(sums: Sums, point: FixedPoint) -> FloatVector:
    """Σ weight·x / Σ weight."""
    return (sums.total * (point.clip / sums.weight)).astype(np.float32)


def read_sum(sums: Sums, point: FixedPoint) -> FloatVector:
    """Σ weight·x."""
    return (sums.total * (point.clip / point.top)).astype(np.float32)


MEAN = Aggregate(
    "mean",
    0,
    "the mean",
    least_bits=6,
    word_bits=lambda bits, carry: bits + 1 + carry,
    pack=_pack,
    unpack=_unpack,
    rules={
        "mean": Rule(read_mean, "mean", weighed=True),
        "sum": Rule(read_sum, "task-arithmetic"),
    },
    dense=read_mean,
    weighable=True,
)
