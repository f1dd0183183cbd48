"""**ties**: masses and counts of both signs in one word (TIES, arXiv 2306.01708).

The word is ``[max(τ,0) | max(−τ,0) | τ>0 | τ<0]`` in fields of b+L, b+L, L, L bits. One sum gives
P, N, C⁺ and C⁻ at every element: the elected sign is that of P − N, and the mean of those who
agree is P/C⁺ or −N/C⁻.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dare_agg.secure.aggregate import (
    TRAILER_WORDS,
    Aggregate,
    FixedPoint,
    Rule,
    Sums,
    bad_words,
    bound,
)
from dare_agg.secure.mean import read_mean, read_sum
from dare_agg.secure.stream import Words
from dare_agg.vectors.layout import FloatVector

_FIELDS = ("positive", "negative", "positive_count", "negative_count")


def _pack(tau: NDArray[np.int64], point: FixedPoint) -> NDArray[np.uint64]:
    field, carry = point.bits + point.carry, point.carry
    words = np.maximum(-tau, 0).astype(np.uint64) << np.uint64(field)
    words |= np.maximum(tau, 0).astype(np.uint64)
    words |= (tau > 0).astype(np.uint64) << np.uint64(2 * field)
    words |= (tau < 0).astype(np.uint64) << np.uint64(2 * field + carry)
    return words


def _unpack(words: Words, point: FixedPoint, parties: int) -> Sums:
    field, carry = point.bits + point.carry, point.carry
    wide = words.astype(np.uint64)
    parts = []
    for width in (field, field, carry, carry):
        parts.append((wide & np.uint64((1 << width) - 1)).astype(np.int64))
        wide >>= np.uint64(width)
    positive, negative, positive_count, negative_count = parts
    bound(positive_count + negative_count, parties, "count")
    for amount, count in ((positive, positive_count), (negative, negative_count)):
        if (amount > count * point.top).any() or (amount < count).any():
            raise bad_words("an amount does not fit its count")
    cut = slice(None, -TRAILER_WORDS)
    return Sums(
        parties,
        positive[cut] - negative[cut],
        int(positive[-2]),
        int(positive[-1]),
        {name: values[cut] for name, values in zip(_FIELDS, parts, strict=True)},
    )


def _elect(sums: Sums, point: FixedPoint) -> FloatVector:
    positive, negative, positive_count, negative_count = (sums.fields[f] for f in _FIELDS)
    up = sums.total > 0
    down = sums.total < 0
    amount = np.where(up, positive, -negative).astype(np.float64)
    count = np.where(up, positive_count, negative_count)
    merged = amount * (point.clip / point.top) / np.maximum(count, 1)
    return np.where(up | down, merged, 0.0).astype(np.float32)


def _shares(sums: Sums) -> tuple[float, float]:
    up, down = sums.fields["positive_count"], sums.fields["negative_count"]
    if not up.size:
        return 0.0, 0.0
    return float(((up == 1) | (down == 1)).mean()), float(((up > 0) & (down > 0)).mean())


TIES = Aggregate(
    "ties",
    1,
    "TIES",
    least_bits=8,  # it also counts signs
    word_bits=lambda bits, carry: 2 * (bits + carry) + 2 * carry,
    pack=_pack,
    unpack=_unpack,
    # P − N is the plain sum, so these sums can be read as all three.
    rules={"ties": Rule(_elect, "ties"), "mean": Rule(read_mean), "sum": Rule(read_sum)},
    dense=read_mean,
    shares=_shares,
)
