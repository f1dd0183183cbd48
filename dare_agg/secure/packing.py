"""Fixed point: from survivors of a delta to the words of a secure sum, and back.

A value is clipped to ±clip and becomes ``τ = ±⌊|x|/clip·(2**b − 1)⌋`` with stochastic
rounding, so its expectation is exact. Words add modulo 2**w and cannot overflow for up to n
parties, L = ⌈log2(n+1)⌉; what is in a word says the aggregate's row (`dare_agg.secure.aggregates`).

Two words follow the survivors' words: the party's weight and the share of its values that
were clipped, each in b bits. Both are only ever seen summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import Keystream
from dare_agg.codec.mask import Mask
from dare_agg.errors import ConfigError, NonFiniteError
from dare_agg.secure.aggregate import MAX_BITS, MIN_BITS, SecureMeasurements, Sums, bad_words
from dare_agg.secure.aggregates import AGGREGATES
from dare_agg.secure.private import noise_reach, noised, private_words
from dare_agg.secure.stream import MAX_WORD_BITS, Words, word_type
from dare_agg.vectors.layout import FloatVector

_CHUNK = 1 << 16


@dataclass(frozen=True)
class Quantiser:
    """How values become words: ``bits`` a value, ``clip``, and how many parties may add up.

    Where the aggregate's parties add noise, its ``variance`` at each, in units of a value's last
    bit; ``clip`` is the norm of a whole vector then.
    """

    aggregate: str
    bits: int
    clip: float
    parties: int
    variance: int = 0

    def __post_init__(self) -> None:
        if self.aggregate not in AGGREGATES:
            raise ConfigError(
                f"aggregate {self.aggregate!r} cannot be summed securely; "
                f"known: {', '.join(AGGREGATES)}"
            )
        if AGGREGATES[self.aggregate].noised != (self.variance > 0):
            raise ConfigError(
                f"noise of variance {self.variance} in {AGGREGATES[self.aggregate].title}; "
                "private-mean has some, and no other"
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
            most = AGGREGATES[self.aggregate].most_bits(self.carry)
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
        """Bits of a word, all fields of the aggregate together."""
        if self.variance:
            return self.reach.bit_length() + 1
        return AGGREGATES[self.aggregate].word_bits(self.bits, self.carry)

    @property
    def reach(self) -> int:
        """The largest magnitude of a sum, with the noise of all."""
        return self.parties * self.top + noise_reach(self.variance, self.parties)

    @property
    def top(self) -> int:
        """The largest magnitude, 2**b − 1, which stands for ``clip``."""
        return (1 << self.bits) - 1


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
    return AGGREGATES[quantiser.aggregate].pack(tau, quantiser).astype(kind)


def pack_private(
    values: FloatVector, mask: Mask, quantiser: Quantiser, keys: tuple[bytes, bytes]
) -> Words:
    """As `pack_party`, with the party's noise; ``keys`` as for `dare_agg.secure.private.noised`."""
    tau = noised(values, mask, quantiser, quantiser.variance, keys)
    words = AGGREGATES[quantiser.aggregate].pack(private_words(tau, quantiser), quantiser)
    return words.astype(word_type(quantiser.word_bits))


def unpack_sums(words: Words, quantiser: Quantiser, parties: int) -> Sums:
    """Read the unmasked sum of ``parties`` parties.

    Raises `ProtocolError` (reason "words") when a sum is out of what honest parties can add
    up to: someone sent malformed words, or the masks did not cancel.
    """
    top = quantiser.top
    sums = AGGREGATES[quantiser.aggregate].unpack(words, quantiser, parties)
    if not 0 < sums.weight <= parties * top or not 0 <= sums.clipped <= parties * top:
        raise bad_words(f"weight {sums.weight}, clipped {sums.clipped} of {parties} parties")
    return sums


def merge_sums(
    sums: Sums, quantiser: Quantiser, rule: str | None = None
) -> tuple[FloatVector, SecureMeasurements]:
    """Turn sums into the merged survivors (unscaled float32) and measurements.

    ``rule`` is one of the aggregate's, by default its own.

    Raises `ConfigError` for a rule that the aggregate does not have.
    """
    row = AGGREGATES[quantiser.aggregate]
    rule = rule or next(iter(row.rules))
    if rule not in row.rules:
        raise ConfigError(f"rule {rule!r} cannot be read from a secure {row.name}")
    clipped = sums.clipped / (sums.parties * quantiser.top)
    measured = SecureMeasurements(sums.parties, clipped, *row.shares(sums))
    return row.rules[rule].read(sums, quantiser), measured


def merge_dense(sums: Sums, quantiser: Quantiser) -> FloatVector:
    """Turn the sums of a dense part into its merged values, float32."""
    return AGGREGATES[quantiser.aggregate].dense(sums, quantiser)
