"""Noise in shares: each party of a secure sum adds its own, and only the sum hides anybody.

A party's noise is a discrete Gaussian, P(x) ∝ exp(−x²/2s²) over the integers, of whole variance
s². It is drawn exactly, by comparing uniform integers from a secret keystream: no floating-point
number decides, whose rounding could show what lies below the noise. A sum of n such is nearly a
discrete Gaussian of variance n·s²; by how little it is not, is counted (`concentrated`).

Reference: Canonne, Kamath and Steinke 2020, arXiv 2004.00010, algorithms 1 to 3 (drawing);
Kairouz, Liu and Steinke 2021, arXiv 2102.06387, theorem 1 (sums; rederived at `concentrated`).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import Keystream
from dare_agg.errors import ConfigError

Integers = NDArray[np.int64]
# Products of the exact comparisons fit 63 bits up to this variance (`_accept`).
MOST_VARIANCE = 1 << 24
_BATCH = 1 << 16
# Values drawn at once for each that is wanted; about half are taken.
_SPARE = 2.2


def discrete_gaussian(variance: int, count: int, key: bytes) -> Integers:
    """``count`` independent draws of the discrete Gaussian of whole ``variance``, exact.

    ``key`` (16 bytes) is secret and used once. Raises `ConfigError` for a variance that is no
    whole number from 1 to 2²⁴.
    """
    if isinstance(variance, bool) or not isinstance(variance, int):
        raise ConfigError(f"noise of variance {variance!r}; a whole number of units² is needed")
    if not 1 <= variance <= MOST_VARIANCE:
        raise ConfigError(
            f"noise of variance {variance} in units of a value's last bit; 1 to {MOST_VARIANCE} "
            "can be drawn exactly: take fewer bits a value, or less noise"
        )
    source = _Uniform(key)
    # The Laplace whose scale is nearest the deviation: most of its draws are taken.
    scale = math.isqrt(variance) + 1
    found = np.empty(count, np.int64)
    at = 0
    while at < count:
        wanted = min(count - at, _BATCH)
        drawn = _laplace(scale, math.ceil(wanted * _SPARE) + 16, source)
        taken = drawn[_accept(np.abs(drawn), variance, scale, source)][:wanted]
        found[at : at + taken.size] = taken
        at += taken.size
    return found


def _laplace(scale: int, most: int, source: _Uniform) -> Integers:
    """Draws of P(x) ∝ exp(−|x|/scale) over the integers, at most so many."""
    low = source.below(np.full(most, scale, np.int64))
    low = low[_exponential(low, np.full(low.size, scale, np.int64), source)]
    high = np.zeros(low.size, np.int64)
    going = np.arange(low.size)
    ones = np.ones(low.size, np.int64)
    while going.size:
        going = going[_exponential(ones[: going.size], ones[: going.size], source)]
        high[going] += 1
    size = low + scale * high
    minus = source.below(np.full(size.size, 2, np.int64)) == 1
    signed = np.where(minus, -size, size)
    return signed[~(minus & (size == 0))]


def _accept(size: Integers, variance: int, scale: int, source: _Uniform) -> NDArray[np.bool_]:
    """True with probability exp(−(|y| − s²/t)²/2s²), t the Laplace's scale."""
    top = np.abs(size * scale - variance)
    bottom = 2 * variance * scale * scale
    # γ = top²/bottom, as a whole part and a rest, both exact. Beyond 2³¹ lies less than e⁻¹⁰⁰.
    fits = top < 1 << 31
    square = np.where(fits, top, 0) ** 2
    whole, rest = square // bottom, square % bottom
    alive = fits & _exponential(rest, np.full(size.size, bottom, np.int64), source)
    going = np.flatnonzero(alive & (whole > 0))
    left = whole[going]
    while going.size:
        ones = np.ones(going.size, np.int64)
        kept = _exponential(ones, ones, source)
        alive[going[~kept]] = False
        going, left = going[kept], left[kept] - 1
        going, left = going[left > 0], left[left > 0]
    return alive


def _exponential(top: Integers, bottom: Integers, source: _Uniform) -> NDArray[np.bool_]:
    """True with probability exp(−top/bottom), for 0 ≤ top ≤ bottom < 2⁵⁸.

    K counts how often coins of probability γ/1, γ/2, … come up in a row; it is even with
    probability exp(−γ).
    """
    even = np.ones(top.size, np.bool_)
    going = np.arange(top.size)
    turn = 1
    while going.size:
        coin = source.below(bottom[going] * turn) < top[going]
        going = going[coin]
        even[going] = ~even[going]
        turn += 1
    return even


class _Uniform:
    """Uniform integers below bounds, by rejection, from a keystream."""

    def __init__(self, key: bytes) -> None:
        self._stream, self._at = Keystream(key), 0

    def below(self, bounds: Integers) -> Integers:
        """One integer from 0 to each bound − 1, all equally likely; bounds are below 2⁶³."""
        found = np.empty(bounds.size, np.int64)
        going = np.arange(bounds.size)
        while going.size:
            words = self._stream.read(self._at, 8 * going.size).copy().view("<u8")
            self._at += 8 * going.size
            drawn = (words >> np.uint64(1)).astype(np.int64)
            bound = bounds[going]
            # The last 2⁶³ mod bound numbers would favour the first ones.
            rest = (np.int64((1 << 63) - 1) % bound + 1) % bound
            good = drawn <= np.int64((1 << 63) - 1) - rest
            found[going[good]] = drawn[good] % bound[good]
            going = going[~good]
        return found


def concentrated(norm: float, variance: int, parties: int, size: int) -> float:
    """ρ of a sum of ``size`` integers that one member moves by ``norm``, noised by ``parties``.

    Each party's noise has whole ``variance``; ``parties`` are those who stay *and* keep their
    noise to themselves. With τ = 10·Σ_{k<n} exp(−2π²s²·k/(k+1)):
    ρ = min(Δ²/2ns² + τd, ½(Δ/√n·s + τ√d)²).

    Why. Adding one more of variance s² to a discrete Gaussian of ks² gives at x the density of one
    of (k+1)s² times a theta function of variance ks²/(k+1), which Poisson summation bounds between
    1 − r and 1 + r, r = 2Σ_j exp(−2π²j²s²k/(k+1)). So the sum P and the discrete Gaussian Q of ns²
    differ nowhere by more than a factor e^(τ/2), for s² ≥ ½. First bound: P_x/P is at most
    e^τ·Q_x/Q, and E over P_x of (Q_x/Q)^(α−1) is at most exp((α−1)·αx²/2ns²), since sums of
    discrete Gaussians are subgaussian; hence D_α ≤ αx²/2ns² + τ an element, and τ ≤ ατ. Second:
    P to Q, Q to Q_x, Q_x to P_x in steps of √2ρ of τ/2, x/√n·s and τ/2, which add up.
    """
    if parties < 1 or size < 1 or variance < 1 or not 0 < norm < math.inf:
        raise ConfigError(
            f"noise of variance {variance} by {parties} parties on {size} values of norm {norm!r}; "
            "numbers above 0 are needed"
        )
    apart = 10 * math.fsum(
        math.exp(-2 * math.pi**2 * variance * k / (k + 1)) for k in range(1, parties)
    )
    ratio = norm / math.sqrt(parties * variance)
    return min(ratio**2 / 2 + apart * size, (ratio + apart * math.sqrt(size)) ** 2 / 2)


def share_variance(rho: float, norm: float, parties: int, size: int) -> int:
    """The least whole variance of a party's noise with which a sum is ρ-concentrated.

    Raises `ConfigError` where it cannot be drawn: noise that the values' units do not hold.
    """
    low, high = 0, MOST_VARIANCE
    if not concentrated(norm, high, parties, size) <= rho:
        needed = norm**2 / (2 * rho * parties)
        raise ConfigError(
            f"ρ = {rho:.3g} of values of norm {norm:.4g} among {parties} parties needs noise of "
            f"variance {needed:.3g} at each, above {MOST_VARIANCE}; take fewer bits a value, a "
            "smaller norm, more parties, or a larger ε"
        )
    while high - low > 1:
        middle = (low + high) // 2
        holds = concentrated(norm, middle, parties, size) <= rho
        low, high = (low, middle) if holds else (middle, high)
    return high
