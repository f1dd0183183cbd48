"""Fixed point: from survivors of a delta to the words of a secure sum, and back.

A value is clipped to ±clip and becomes ``τ = ±⌊|x|/clip·(2**b − 1)⌋`` with stochastic
rounding, so its expectation is exact. Words add modulo 2**w and cannot overflow for up to n
parties, L = ⌈log2(n+1)⌉:

- **mean**: the word is τ in two's complement, w = b + 1 + L;
- **ties**: the word is ``[max(τ,0) | max(−τ,0) | τ>0 | τ<0]`` in fields of b+L, b+L, L, L
  bits. One sum gives P, N, C⁺ and C⁻ at every element: the elected sign is that of P − N,
  and the mean of those who agree is P/C⁺ or −N/C⁻ (TIES, arXiv 2306.01708).

Two words follow the survivors' words: the party's weight and the share of its values that
were clipped, each in b bits. Both are only ever seen summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import Keystream
from dare_agg.errors import ConfigError, NonFiniteError, ProtocolError
from dare_agg.secure.stream import MAX_WORD_BITS, Words, word_type
from dare_agg.vectors.layout import FloatVector

AGGREGATES = ("mean", "ties")
TRAILER_WORDS = 2
MIN_BITS, MAX_BITS = 4, 24
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Quantiser:
    """How values become words: ``bits`` a value, ``clip``, and how many parties may add up."""

    aggregate: str
    bits: int
    clip: float
    parties: int

    def __post_init__(self) -> None:
        if self.aggregate not in AGGREGATES:
            raise ConfigError(
                f"aggregate {self.aggregate!r} cannot be summed securely; "
                f"known: {', '.join(AGGREGATES)}"
            )
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ConfigError(f"bits = {self.bits}; {MIN_BITS} to {MAX_BITS} are allowed")
        if not (0 < self.clip < 1e6):
            raise ConfigError(
                f"clip = {self.clip}; a finite number above 0 and below 1e6 is needed"
            )
        if self.parties < 1:
            raise ConfigError(f"parties = {self.parties}; at least 1 is needed")
        if self.word_bits > MAX_WORD_BITS:
            most = self.bits - -(-(self.word_bits - MAX_WORD_BITS) // 2)
            raise ConfigError(
                f"{self.aggregate} of {self.parties} parties with bits = {self.bits} needs words "
                f"of {self.word_bits} bits; {MAX_WORD_BITS} is the most: set bits = {most} or fewer"
            )

    @property
    def carry(self) -> int:
        """L = ⌈log2(n+1)⌉: bits that the sum of n parties adds."""
        return self.parties.bit_length()

    @property
    def word_bits(self) -> int:
        if self.aggregate == "mean":
            return self.bits + 1 + self.carry
        return 2 * (self.bits + self.carry) + 2 * self.carry

    @property
    def top(self) -> int:
        """The largest magnitude, 2**b − 1, which stands for ``clip``."""
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class Sums:
    """What a secure sum reveals: integers, over the survivors of the parties that stayed.

    For a mean ``total`` is Σ τ; for TIES it is P − N and the four fields are given. The
    weight is in units of 1/top, the clipped share too.
    """

    parties: int
    total: NDArray[np.int64]
    weight: int
    clipped: int
    positive: NDArray[np.int64] | None = None
    negative: NDArray[np.int64] | None = None
    positive_count: NDArray[np.int64] | None = None
    negative_count: NDArray[np.int64] | None = None

    def part(self, start: int, stop: int) -> Sums:
        """The sums of some of the values; weight and clipped share stay."""
        cut = slice(start, stop)
        return Sums(
            self.parties,
            self.total[cut],
            self.weight,
            self.clipped,
            *(
                None if values is None else values[cut]
                for values in (
                    self.positive,
                    self.negative,
                    self.positive_count,
                    self.negative_count,
                )
            ),
        )


@dataclass(frozen=True)
class SecureMeasurements:
    """What the secure round reports; ``lone_share`` is the share of elements with exactly one
    contributor on a side (TIES: that party's value shows, unattributed)."""

    parties: int
    clipped_share: float
    lone_share: float | None = None
    conflict_share: float | None = None


def quantise(
    values: FloatVector, quantiser: Quantiser, key: bytes, gain: float = 1.0
) -> tuple[NDArray[np.int64], int]:
    """Return ``(τ, clipped)``: fixed-point integers with stochastic rounding.

    ``gain`` in (0, 1] multiplies the values (a party's share of the largest weight).
    Randomness is the AES-128-CTR keystream of ``key`` (16 bytes, to be used once). Raises
    `NonFiniteError`.
    """
    if not 0 < gain <= 1:
        raise ConfigError(f"gain = {gain}; a number above 0 and at most 1 is needed")
    tau = np.empty(values.size, np.int64)
    stream = Keystream(key)
    clipped = 0
    per_unit = gain * quantiser.top / quantiser.clip
    limit = gain * quantiser.top
    for lo in range(0, values.size, _CHUNK):
        piece = values[lo : lo + _CHUNK].astype(np.float64)
        if not np.isfinite(piece).all():
            at = lo + int(np.argmin(np.isfinite(piece)))
            raise NonFiniteError(
                f"survivor {at} is {values[at]}; only finite values can be summed: check the "
                "training step (learning rate, overflow)"
            )
        sign = np.signbit(piece)
        np.abs(piece, out=piece)
        piece *= per_unit
        clipped += int(np.count_nonzero(piece > limit))
        np.minimum(piece, limit, out=piece)
        whole = np.floor(piece)
        piece -= whole
        piece *= 4294967296.0
        whole += stream.words(lo, piece.size) < piece
        np.negative(whole, out=whole, where=sign)
        tau[lo : lo + whole.size] = whole
    return tau, clipped


def pack_party(values: FloatVector, quantiser: Quantiser, key: bytes, gain: float = 1.0) -> Words:
    """Return a party's words: ``values.size`` survivors, then weight and clipped share."""
    tau, clipped = quantise(values, quantiser, key, gain)
    share = clipped / values.size if values.size else 0.0
    trailer = np.array(
        [max(1, round(gain * quantiser.top)), round(share * quantiser.top)], np.int64
    )
    tau = np.concatenate([tau, trailer])
    kind = word_type(quantiser.word_bits)
    modulus = np.int64((1 << min(quantiser.word_bits, 62)) - 1)
    if quantiser.aggregate == "mean":
        return (tau & modulus).astype(kind)
    field, carry = quantiser.bits + quantiser.carry, quantiser.carry
    words = np.maximum(-tau, 0).astype(np.uint64) << np.uint64(field)
    words |= np.maximum(tau, 0).astype(np.uint64)
    words |= (tau > 0).astype(np.uint64) << np.uint64(2 * field)
    words |= (tau < 0).astype(np.uint64) << np.uint64(2 * field + carry)
    return words.astype(kind)


def unpack_sums(words: Words, quantiser: Quantiser, parties: int) -> Sums:
    """Read the unmasked sum of ``parties`` parties.

    Raises `ProtocolError` (reason "words") when a sum is out of what honest parties can add
    up to: someone sent malformed words, or the masks did not cancel.
    """
    top = quantiser.top
    if quantiser.aggregate == "mean":
        half = 1 << (quantiser.word_bits - 1)
        total = words.astype(np.int64)
        total[total >= half] -= 2 * half
        _bound(np.abs(total), parties * top, "sum")
        sums = Sums(parties, total[:-TRAILER_WORDS], int(total[-2]), int(total[-1]))
    else:
        field, carry = quantiser.bits + quantiser.carry, quantiser.carry
        wide = words.astype(np.uint64)
        parts = []
        for width in (field, field, carry, carry):
            parts.append((wide & np.uint64((1 << width) - 1)).astype(np.int64))
            wide >>= np.uint64(width)
        positive, negative, positive_count, negative_count = parts
        _bound(positive_count + negative_count, parties, "count")
        for amount, count in ((positive, positive_count), (negative, negative_count)):
            if (amount > count * top).any() or (amount < count).any():
                raise _bad_words("an amount does not fit its count")
        cut = slice(None, -TRAILER_WORDS)
        sums = Sums(
            parties,
            positive[cut] - negative[cut],
            int(positive[-2]),
            int(positive[-1]),
            positive[cut],
            negative[cut],
            positive_count[cut],
            negative_count[cut],
        )
    if not 0 < sums.weight <= parties * top or not 0 <= sums.clipped <= parties * top:
        raise _bad_words(f"weight {sums.weight}, clipped {sums.clipped} of {parties} parties")
    return sums


def _bound(values: NDArray[np.int64], most: int, what: str) -> None:
    if values.size and int(values.max()) > most:
        raise _bad_words(f"a {what} of {int(values.max())}, at most {most} is possible")


def _bad_words(why: str) -> ProtocolError:
    return ProtocolError(
        f"the unmasked sum is malformed: {why}; a party sent bad words or was shown another "
        "round: nothing was merged",
        reason="words",
    )


def merge_sums(
    sums: Sums, quantiser: Quantiser, rule: str | None = None
) -> tuple[FloatVector, SecureMeasurements]:
    """Turn sums into the merged survivors (unscaled float32) and measurements.

    ``rule`` is "mean" (Σ weight·x / Σ weight), "sum" (Σ weight·x) or "ties"; by default the
    quantiser's aggregate. Sums of TIES give all three, since P − N is the plain sum.
    """
    rule = rule or quantiser.aggregate
    clipped = sums.clipped / (sums.parties * quantiser.top)
    if rule in ("mean", "sum"):
        unit = quantiser.clip / (sums.weight if rule == "mean" else quantiser.top)
        merged = (sums.total * unit).astype(np.float32)
        if sums.positive is None:
            return merged, SecureMeasurements(sums.parties, clipped)
    elif rule == "ties" and sums.positive is not None:
        merged = _elect(sums, quantiser)
    else:
        raise ConfigError(f"rule {rule!r} cannot be read from a secure {quantiser.aggregate}")
    assert sums.positive_count is not None and sums.negative_count is not None
    lone = (sums.positive_count == 1) | (sums.negative_count == 1)
    conflict = (sums.positive_count > 0) & (sums.negative_count > 0)
    return merged, SecureMeasurements(
        sums.parties,
        clipped,
        float(lone.mean()) if lone.size else 0.0,
        float(conflict.mean()) if conflict.size else 0.0,
    )


def _elect(sums: Sums, quantiser: Quantiser) -> FloatVector:
    assert sums.positive is not None and sums.negative is not None
    assert sums.positive_count is not None and sums.negative_count is not None
    up = sums.total > 0
    down = sums.total < 0
    amount = np.where(up, sums.positive, -sums.negative).astype(np.float64)
    count = np.where(up, sums.positive_count, sums.negative_count)
    merged = amount * (quantiser.clip / quantiser.top) / np.maximum(count, 1)
    return np.where(up | down, merged, 0.0).astype(np.float32)
