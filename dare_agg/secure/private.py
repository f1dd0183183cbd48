"""**private-mean**: a mean whose parties add noise before they mask, so that no sum is without.

Each party scales its vector to norm C, last of all that happens to it: the survivors, multiplied
as they are where the sum is read, with the dense values beside them. It rounds to whole units,
up or down by chance and again until the integers keep a bound on their norm, adds a discrete
Gaussian of the terms' variance, and masks. The sum is divided by the cohort's size, whoever
stayed. Weights are one constant, and what was clipped is not told.

Reference: Kairouz, Liu and Steinke 2021, arXiv 2102.06387, section 4 (conditional rounding).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import Keystream
from dare_agg.codec.mask import Mask
from dare_agg.errors import ConfigError, NonFiniteError
from dare_agg.privacy.shares import concentrated, discrete_gaussian, share_variance
from dare_agg.secure.aggregate import TRAILER_WORDS, Aggregate, FixedPoint, Rule, Sums, bound
from dare_agg.secure.mean import MEAN
from dare_agg.secure.stream import Words
from dare_agg.vectors.layout import FloatVector

# A rounding is longer than the bound with less than this chance, and is then drawn again.
_LONGER = 2.0**-10
_TRIES = 64
# A float64 norm is right to less than this.
_SLACK = 1e-12
# Standard deviations of a sum's noise that its word has room for: of 2²⁸ words one is outside
# with a chance below 2⁻⁴⁰, since a discrete Gaussian is subgaussian.
_REACH = 9.8
# Finer units than these gain nothing beside the noise.
USUAL_BITS, LEAST_BITS = 16, 4
_CHUNK = 1 << 16


def noise_reach(variance: int, parties: int) -> int:
    """The largest noise in a sum of so many parties that a word has room for."""
    return math.ceil(_REACH * math.sqrt(parties * variance))


def square_bound(top: int, size: int) -> int:
    """The largest Σ τ² of a vector of norm ``top`` and ``size`` values, once it is rounded."""
    always = (top + math.sqrt(size)) ** 2
    slack = math.sqrt(2 * math.log(1 / _LONGER)) * (top + math.sqrt(size) / 2)
    return math.floor(min(always, top**2 + size / 4 + slack))


def released(top: int, size: int, variance: int, honest: int) -> float:
    """ρ of a sum whose ``honest`` parties stay and keep their noise to themselves."""
    return concentrated(math.sqrt(square_bound(top, size)), variance, honest, size)


def fitting(rho: float, size: int, honest: int, bits: int = 0) -> tuple[int, int]:
    """Bits of a value, and variance of each party's noise, with which a sum costs at most ``rho``.

    The most bits that leave noise which can be drawn; ``bits`` where they are given. Raises
    `ConfigError` where there are none.
    """
    for tried in [bits] if bits else range(USUAL_BITS, LEAST_BITS - 1, -1):
        norm = math.sqrt(square_bound((1 << tried) - 1, size))
        try:
            return tried, share_variance(rho, norm, honest, size)
        except ConfigError as error:
            refusal = error
    raise ConfigError(
        f"secure-bits = {bits or LEAST_BITS} of {size} values: {refusal}"
        + (" (secure-bits = 0 chooses them)" if bits else "")
    )


def rescale_of(mask: Mask) -> FloatVector:
    """What each survivor is multiplied by where a delta is read."""
    return np.concatenate(
        [np.broadcast_to(np.float32(scale), at.shape) for at, scale in mask.blocks()]
    )


def noised(
    values: FloatVector, mask: Mask, point: FixedPoint, variance: int, keys: tuple[bytes, bytes]
) -> NDArray[np.int64]:
    """A party's integers: clipped to norm `FixedPoint.clip`, rounded, with its noise.

    ``values`` are unscaled survivors, then dense values; ``keys`` (16 bytes each, secret, used
    once) are for the rounding and the noise. Raises `NonFiniteError`.
    """
    if not np.isfinite(values).all():
        raise NonFiniteError(
            "a survivor is no finite number; only such can be summed: check the training step "
            "(learning rate, overflow)"
        )
    whole = values.astype(np.float64)
    whole[: mask.survivors] *= rescale_of(mask)
    # By parts of the largest, so that no square overflows.
    largest = float(np.abs(whole).max(initial=0.0))
    norm = largest * math.sqrt(math.fsum(np.square(whole / largest))) if largest else 0.0
    factor = point.top / point.clip
    if norm > point.clip:
        factor = point.top / norm
    whole *= factor * (1 - _SLACK)
    tau = _rounded(whole, square_bound(point.top, values.size), keys[0])
    return tau + discrete_gaussian(variance, values.size, keys[1])


def _rounded(values: NDArray[np.float64], most: int, key: bytes) -> NDArray[np.int64]:
    """Whole numbers, each up or down by chance, whose squares add up to ``most`` at most."""
    low = np.floor(values)
    rest = (values - low) * 4294967296.0
    stream = Keystream(key)
    tau = low.astype(np.int64)
    for turn in range(_TRIES):
        for lo in range(0, tau.size, _CHUNK):
            cut = slice(lo, min(lo + _CHUNK, tau.size))
            drawn = stream.words(turn * tau.size + lo, cut.stop - lo)
            tau[cut] = low[cut].astype(np.int64) + (drawn < rest[cut])
        if int(np.sum(np.square(tau))) <= most:
            return tau
    # Less likely than 2⁻⁶⁰⁰. Towards zero no vector grows longer.
    return np.trunc(values).astype(np.int64)


def private_words(tau: NDArray[np.int64], point: FixedPoint) -> NDArray[np.int64]:
    """The integers with their trailer: one weight for all, and nothing of what was clipped."""
    return np.concatenate([tau, np.array([point.top, 0], np.int64)])


def _unpack(words: Words, point: FixedPoint, parties: int) -> Sums:
    half = 1 << (point.word_bits - 1)
    total = words.astype(np.int64)
    total[total >= half] -= 2 * half
    bound(np.abs(total), point.reach, "noised sum")
    return Sums(parties, total[:-TRAILER_WORDS], int(total[-2]), int(total[-1]))


def _read(sums: Sums, point: FixedPoint) -> FloatVector:
    """Σ x over the size of the cohort, whoever stayed."""
    return (sums.total * (point.clip / point.top / point.parties)).astype(np.float32)


PRIVATE_MEAN: Aggregate = replace(
    MEAN,
    name="private-mean",
    code=3,
    title="the private mean",
    least_bits=LEAST_BITS,
    unpack=_unpack,
    rules={"mean": Rule(_read)},
    dense=_read,
    weighable=False,
    usual_bits=USUAL_BITS,
    noised=True,
)
