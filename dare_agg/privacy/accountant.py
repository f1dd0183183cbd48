"""What a run has spent of its privacy: (ε, δ) of everything that was released so far.

Unit: one member, a client or a record. Neighbours: a run with the member and one without (add or
remove one). Sampling: each member takes part in a release with probability ``rate``, by
itself (Poisson), and nobody is told who did; 1 is no sampling and nothing gained.

Two kinds of releases are counted. Gaussian noise on a sum (`Sampled`) by its privacy loss
distribution, which is tight to what the grid rounds up. Noise that the parties of a secure sum
add in shares, by zero-concentrated privacy ρ, a bound.

Reference: Doroshenko et al. 2022, arXiv 2207.04380; Canonne, Kamath and Steinke 2020,
arXiv 2004.00010, proposition 12 (ρ to ε).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from dare_agg.errors import ConfigError
from dare_agg.privacy.loss import Sampled, composed, epsilon_of

# Above it a guarantee says next to nothing: e^50 is 5·10²¹.
MOST_EPSILON = 50.0
LEAST_DELTA = 1e-9
LEAST_NOISE, MOST_NOISE = 0.05, 1e5
# Stands for the rate of a release whose noise its parties add in shares: nobody is drawn, and of
# noise multiplier z it costs ρ = 1/2z².
IN_SHARES = -1.0
# Stands for the rate of a release that an earlier one has paid for: it costs nothing more.
PAID = 0.0
_CLOSE = 1e-3


@dataclass(frozen=True)
class Spent:
    """What was released: Gaussian releases with how often each, and Σ ρ of noise in shares."""

    gaussian: Mapping[Sampled, int] = field(default_factory=dict)
    rho: float = 0.0

    def add(self, noise: float, rate: float = 1.0, times: int = 1) -> Spent:
        """With ``times`` releases more of noise multiplier ``noise``.

        Gaussian, at a sampling ``rate``; at `IN_SHARES` of noise that parties add in shares.
        """
        if rate == IN_SHARES:
            _check_noise(noise, 1.0)
            return self.add_rho(times / (2 * noise**2))
        _check_noise(noise, rate)
        return replace(
            self, gaussian=Counter(self.gaussian) + Counter({Sampled(noise, rate): times})
        )

    def add_rho(self, rho: float) -> Spent:
        """With a release more of ρ-zero-concentrated privacy."""
        if not 0 < rho < math.inf:
            raise ConfigError(f"ρ = {rho!r}; a number above 0 is needed")
        return replace(self, rho=self.rho + rho)

    def epsilon(self, delta: float) -> float:
        """ε at ``delta``: never below the true one, infinite where no ε holds.

        Where both kinds were released each has half of δ.
        """
        if not 0 < delta < 1:
            raise ConfigError(f"δ = {delta!r}; a number between 0 and 1 is needed")
        if not self.rho:
            return _gaussian_epsilon(frozenset(self.gaussian.items()), delta)
        if not self.gaussian:
            return concentrated_epsilon(self.rho, delta)
        halves = _gaussian_epsilon(frozenset(self.gaussian.items()), delta / 2)
        return halves + concentrated_epsilon(self.rho, delta / 2)


def spent(releases: Iterable[tuple[float, float]]) -> Spent:
    """What releases of these noise multipliers and rates spent together."""
    total = Spent()
    for (noise, rate), times in Counter(releases).items():
        if rate != PAID:
            total = total.add(noise, rate, times)
    return total


@lru_cache(maxsize=256)
def _gaussian_epsilon(parts: frozenset[tuple[Sampled, int]], delta: float) -> float:
    if not parts:
        return 0.0
    whole = math.fsum(times / one.noise**2 for one, times in parts if one.rate == 1)
    # Releases to all are one release of less noise.
    joined = [(Sampled(1 / math.sqrt(whole)), 1)] if whole else []
    joined += sorted(
        ((one, times) for one, times in parts if one.rate < 1),
        key=lambda part: (part[0].noise, part[0].rate),
    )
    # A release to all is the same curve in both directions.
    directions = (False,) if len(joined) == 1 and whole else (False, True)
    return max(epsilon_of(composed(joined, delta, adding), delta) for adding in directions)


def concentrated_epsilon(rho: float, delta: float) -> float:
    """The least ε of ρ-zCDP at ``delta`` over Rényi orders α.

    ε(α) = αρ + ln(1 − 1/α) − (ln δ + ln α)/(α − 1)
    """

    def at(order: float) -> float:
        shift = math.log(delta) + math.log(order)
        return order * rho + math.log1p(-1 / order) - shift / (order - 1)

    # It falls and then rises; the least of ρ-zCDP alone is near 1 + √(ln(1/δ)/ρ).
    low, high = 1 + 1e-6, 2 + 4 * math.sqrt(math.log(1 / delta) / rho)
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if at(left) < at(right) else (left, high)
    return max(0.0, at((low + high) / 2))


def noise_for(epsilon: float, delta: float, releases: int, rate: float = 1.0) -> float:
    """The noise multiplier with which so many releases spend at most ``epsilon``.

    At most a thousandth above the least. Raises `ConfigError` where even the largest does not.
    """
    return noise_beside(Spent(), epsilon, delta, releases, rate)


def noise_beside(
    already: Spent, epsilon: float, delta: float, releases: int, rate: float = 1.0
) -> float:
    """As `noise_for`, where ``already`` counts towards ``epsilon`` too."""

    def holds(noise: float) -> bool:
        return already.add(noise, rate, releases).epsilon(delta) <= epsilon

    low, high = 0.5, 1.0
    while not holds(high):
        low, high = high, high * 2
        if high > MOST_NOISE:
            raise ConfigError(
                f"ε = {epsilon:g} at δ = {delta:g} cannot be kept over {releases} releases; take "
                "fewer, or a larger ε"
            )
    while holds(low):
        if low == LEAST_NOISE:
            return low
        low, high = max(LEAST_NOISE, low / 2), low
    while high / low > 1 + _CLOSE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def rho_for(epsilon: float, delta: float) -> float:
    """The ρ that ε at δ leaves room for, at most a millionth below the largest."""
    low, high = 1e-12, 1e4
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (
            (middle, high) if concentrated_epsilon(middle, delta) <= epsilon else (low, middle)
        )
    return low


def check_budget(epsilon: float, delta: float, members: int, *, weak: bool = False) -> None:
    """Raise `ConfigError` for an (ε, δ) among so many members that promises nothing."""
    if isinstance(members, bool) or not isinstance(members, int) or members < 2:
        raise ConfigError(f"privacy among {members!r} members; at least 2 are needed")
    for name, value in (("ε", epsilon), ("δ", delta)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"privacy of {name} = {value!r}; a number above 0 is needed")
    if epsilon > MOST_EPSILON and not (weak and epsilon < math.inf):
        raise ConfigError(
            f"privacy of ε = {epsilon:g} promises nothing anyone could rely on; take at most "
            f"{MOST_EPSILON:g} (8 is much already), or say so: dp-weak = true (weak=True)"
        )
    if delta >= 1 / members:
        raise ConfigError(
            f"privacy of δ = {delta:g} among {members} members: one of them may be shown outright; "
            f"take less than 1/{members}, or 0 for {default_delta(members):.2g}"
        )
    if delta < LEAST_DELTA:
        raise ConfigError(
            f"privacy of δ = {delta:g}; at least {LEAST_DELTA:g} can be accounted for"
        )


def default_delta(members: int) -> float:
    """δ where none is said: members^−1.1, as is usual, and no more than a tenth of 1/members."""
    return max(LEAST_DELTA, min(members**-1.1, 0.1 / members))


def _check_noise(noise: float, rate: float) -> None:
    if not LEAST_NOISE <= noise <= MOST_NOISE:
        raise ConfigError(
            f"a noise multiplier of {noise!r}; {LEAST_NOISE:g} to {MOST_NOISE:g} can be accounted "
            "for"
        )
    if not 0 < rate <= 1:
        raise ConfigError(f"a sampling rate of {rate!r}; a number above 0, at most 1, is needed")


__all__ = [
    "Spent",
    "check_budget",
    "concentrated_epsilon",
    "default_delta",
    "noise_beside",
    "noise_for",
    "rho_for",
    "spent",
]
