"""Privacy loss distributions of Gaussian noise on a grid, each at least as bad as the true one.

The mechanism answers a sum that one member, who is there with probability q, moves by 1, with
N(0, z²) added. Its hockey-stick curve δ(ε) is known exactly; joined by straight lines in e^ε
between the points of a grid it lies nowhere lower, and is the curve of a distribution on the
grid. Such distributions compose by convolution, and what composes is an upper bound of what the
mechanisms compose to.

Reference: Doroshenko et al. 2022, arXiv 2207.04380 ("connect the dots"); Koskela et al. 2020,
arXiv 1906.03049 (FFT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# The finest grid of losses, a multiple of dp-accounting's: a coarser grid is an upper bound.
STEP = 2e-4
# Losses beyond are counted as infinite: e^ε has to fit a float64 beside its tail.
MOST_LOSS = 600.0
_MOST_POINTS = 1 << 18
# Share of δ that may lie outside of what is convolved; all of it is added to δ.
_TAIL_SHARE = 1e-4
_ORDERS = np.geomspace(1e-3, 1e3, 49)
_ROOT_2 = math.sqrt(2.0)
_erfc = np.frompyfunc(math.erfc, 1, 1)


@dataclass(frozen=True)
class Loss:
    """P(loss = (first + i)·step) for i = 0, 1, …, and that of an infinite loss."""

    first: int
    step: float
    masses: Floats
    infinite: float

    @property
    def losses(self) -> Floats:
        """The grid's losses."""
        return np.asarray((self.first + np.arange(self.masses.size)) * self.step, np.float64)


@dataclass(frozen=True)
class Sampled:
    """One Gaussian mechanism of noise multiplier ``noise``, its members sampled with ``rate``."""

    noise: float
    rate: float = 1.0

    def delta(self, losses: Floats, adding: bool) -> Floats:
        """δ(ε) of the pair of neighbours: a member removed, or (``adding``) added."""
        z, q = self.noise, self.rate
        sign = -1.0 if adding else 1.0
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = np.exp(sign * losses)
            inside = ratio > 1 - q
            x = z * z * np.log((ratio - (1 - q)) / q) + 0.5
            x = np.where(inside, x, 0.0)
            if adding:
                grown = np.exp(losses)
                found = (1 - grown * (1 - q)) * _tail(-x / z) - q * grown * _tail((1 - x) / z)
                outside = np.zeros_like(losses)
            else:
                found = q * _tail((x - 1) / z) - (ratio - (1 - q)) * _tail(x / z)
                outside = -np.expm1(losses)
        return np.clip(np.where(inside, found, outside), 0.0, 1.0)

    def range(self, mass: float, adding: bool) -> tuple[float, float]:
        """Losses between which all lie but ``mass`` on each side."""
        z, q = self.noise, self.rate
        reach = z * _deviations(mass)

        def loss(x: float) -> float:
            exponent = (2 * x - 1) / (2 * z * z)
            if exponent > 600 or q == 1:
                return exponent + math.log(q)
            return math.log1p(q * math.expm1(exponent))

        if adding:
            return -loss(reach), -loss(-reach)
        return loss(-reach), loss(1 + reach)


def discretised(one: Sampled, step: float, mass: float, adding: bool) -> Loss:
    """The mechanism's losses on a grid, all but ``mass`` on each side told apart."""
    low, high = one.range(mass, adding)
    first = math.floor(min(max(low, -MOST_LOSS), MOST_LOSS) / step) - 1
    last = max(first + 1, math.ceil(min(high, MOST_LOSS) / step))
    losses = np.arange(first, last + 1).astype(np.float64) * np.float64(step)
    delta = one.delta(losses, adding)
    # Slopes of the curve over e^ε between neighbours, times e^ε of either end.
    rise = np.diff(delta)
    above = np.append(rise / math.expm1(step), 0.0)
    below = np.insert(rise / -math.expm1(-step), 0, delta[0] - 1.0)
    return Loss(first, step, np.maximum(above - below, 0.0), float(delta[-1]))


def composed(parts: Sequence[tuple[Sampled, int]], delta: float, adding: bool) -> Loss:
    """What all mechanisms, each so many times, lose together; ``delta`` sets what tails count."""
    total = sum(count for _, count in parts)
    tail = delta * _TAIL_SHARE
    each = tail / (4 * total)
    step = STEP
    ends = [one.range(each, adding) for one, _ in parts]
    while max(min(b, MOST_LOSS) - max(a, -MOST_LOSS) for a, b in ends) / step > _MOST_POINTS:
        step *= 2
    while True:
        losses = [(discretised(one, step, each, adding), count) for one, count in parts]
        survives = sum(c * math.log1p(-min(loss.infinite, 1 - 1e-16)) for loss, c in losses)
        infinite = -math.expm1(survives) + tail / 4
        if infinite > delta:
            return Loss(0, step, np.zeros(1), infinite)
        low, high = _window(losses, tail / 4)
        first, last = math.floor(low / step), math.ceil(high / step)
        longest = max([last - first + 1, *(loss.masses.size for loss, _ in losses)])
        if longest <= _MOST_POINTS:
            break
        step *= 2
    size = 1 << (longest - 1).bit_length()
    spectrum = np.ones(size // 2 + 1, np.complex128)
    shift = 0
    for loss, count in losses:
        spectrum *= np.fft.rfft(loss.masses, size) ** count
        shift += loss.first * count
    masses = np.fft.irfft(spectrum, size)
    masses = np.maximum(np.roll(masses, (shift - first) % size), 0.0)
    return Loss(first, step, masses[: last - first + 1], infinite)


def epsilon_of(loss: Loss, delta: float) -> float:
    """The least ε ≥ 0 at which the hockey-stick curve is at most ``delta``; infinite for none."""
    if loss.infinite > delta:
        return math.inf
    losses, masses = loss.losses, loss.masses
    # Σ p_j and Σ p_j·e^(−loss_j) over the losses above each point, from the top.
    mass = np.cumsum(masses[::-1])[::-1]
    with np.errstate(over="ignore", under="ignore"):
        shrunk = np.cumsum((masses * np.exp(-np.clip(losses, -700, 700)))[::-1])[::-1]
    curve = mass - np.exp(np.clip(losses, -700, 700)) * shrunk + loss.infinite
    # The first point where it holds; ε lies in the piece before, where all from it on count.
    holds = np.flatnonzero(curve <= delta)
    at = int(holds[0]) if holds.size else losses.size - 1
    above = mass[at] + loss.infinite - delta
    if above <= 0 or shrunk[at] <= 0:
        return max(0.0, float(losses[at - 1])) if at else 0.0
    found = max(0.0, math.log(above / shrunk[at]))
    return found if found <= MOST_LOSS else math.inf


def _window(losses: Sequence[tuple[Loss, int]], mass: float) -> tuple[float, float]:
    """Between which the sum of the losses lies but for ``mass`` on each side (Chernoff)."""
    ends = []
    known = [
        (loss.losses[loss.masses > 0], np.log(loss.masses[loss.masses > 0]), count)
        for loss, count in losses
    ]
    for sign in (-1.0, 1.0):
        best = math.inf
        for order in _ORDERS:
            growth = 0.0
            for at, logs, count in known:
                exponents = sign * order * at + logs
                top = float(exponents.max())
                growth += count * (top + math.log(float(np.sum(np.exp(exponents - top)))))
            best = min(best, (growth - math.log(mass)) / order)
        reach = sum(count * sign * float(at[-1 if sign > 0 else 0]) for at, _, count in known)
        ends.append(sign * min(best, reach))
    return ends[0], max(ends)


def _tail(x: Floats) -> Floats:
    """P(N(0, 1) > x)."""
    return 0.5 * np.asarray(_erfc(x / _ROOT_2), np.float64)


def _deviations(mass: float) -> float:
    """x with P(N(0, 1) > x) ≤ ``mass``."""
    low, high = 0.0, 38.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * math.erfc(middle / _ROOT_2) > mass else (low, middle)
    return high
