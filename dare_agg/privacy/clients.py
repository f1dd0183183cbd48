"""Privacy of whole clients, kept by the server: what a run is set to, and its rounds.

Promise: what the run releases, the model of each round, is (ε, δ)-differentially private. Unit:
one client with all its data. Neighbours: with the client and without it. Trust: the server sees
single updates, and keeps the seed of its noise to itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dare_agg.codec.derive import derive_key
from dare_agg.errors import ConfigError
from dare_agg.privacy.accountant import (
    LEAST_NOISE,
    MOST_NOISE,
    check_budget,
    default_delta,
    noise_for,
)
from dare_agg.privacy.banded import Places
from dare_agg.privacy.central import Clipping, Contribution, Release, release
from dare_agg.privacy.ledger import Budget, Charge, open_budget
from dare_agg.privacy.spaced import SpacedRun

# Rounds that a client may have to wait; as many vectors of noise are held.
MOST_APART = 1000


@dataclass(frozen=True)
class ClientPrivacy:
    """What clients are promised; checked when made.

    Attributes
    ----------
    members
        how many clients there are, known to everyone; sums are divided by the
        number of them that a round expects, whoever answers.
    epsilon, delta
        the budget; a δ of 0 is members^−1.1, at most a tenth of 1/members. When ε is
        spent the run ends with the model it has.
    clip
        largest norm of a client's survivors, as they are summed (rescaled), with its
        dense values.
    quantile
        share of the clients that should lie below the norm, which then follows them from
        ``clip`` on; 0 leaves it where it is.
    noise
        noise multiplier, standard deviation by norm; 0 takes the least with which all
        rounds of the run keep ε.
    apart
        for clients who cannot be sampled: each takes part at most once in so many rounds, and
        rounds share their noise (`dare_agg.privacy.spaced`); 0 samples them.
    weak
        admit an ε above 50, which promises next to nothing.
    ledger
        file of the budget and of the noise's secret seed; without one a run cannot be
        resumed.
    """

    members: int
    epsilon: float = 8.0
    delta: float = 0.0
    clip: float = 1.0
    quantile: float = 0.0
    noise: float = 0.0
    apart: int = 0
    weak: bool = False
    ledger: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.delta == 0 and isinstance(self.members, int) and self.members > 1:
            object.__setattr__(self, "delta", default_delta(self.members))
        check_budget(self.epsilon, self.delta, self.members, weak=self.weak)
        check_number("clip", self.clip, 1e-9, 1e9)
        if self.quantile:
            check_number("quantile", self.quantile, 0.01, 0.99)
        if self.noise:
            check_number("noise", self.noise, LEAST_NOISE, MOST_NOISE)
        if self.apart:
            if not isinstance(self.apart, int):
                raise ConfigError(f"privacy: apart = {self.apart!r}; a whole number is needed")
            check_number("apart", self.apart, 1, MOST_APART)
            if self.quantile:
                raise ConfigError(
                    f"privacy: a norm that follows the clients' (quantile = {self.quantile:g}) "
                    f"with apart = {self.apart}: rounds that share their noise have one norm; "
                    "leave quantile out"
                )

    def check_rate(self, rate: float) -> None:
        """Raise `ConfigError` for a share of the clients of a round that cannot be kept apart."""
        if not rate > 0:
            raise ConfigError(f"privacy of clients with fraction_train = {rate!r}: nobody is drawn")
        if not self.apart:
            return
        if rate * self.apart > 1 + 1e-9:
            raise ConfigError(
                f"privacy: fraction_train = {rate:g} of the clients in each round, none of them "
                f"twice in {self.apart} (apart): take at most {1 / self.apart:.4g}"
            )
        if rate * self.members < 1:
            raise ConfigError(
                f"privacy: fraction_train = {rate:g} of {self.members} members is nobody; take at "
                f"least {1 / self.members:.4g}"
            )

    def begin(self, rounds: int, rate: float) -> PrivateRun | SpacedRun:
        """The run, at the start or where its ledger left it, with the noise of its rounds."""
        self.check_rate(rate)
        path = None if self.ledger is None else Path(self.ledger)
        budget = open_budget(path, self.epsilon, self.delta, self.members, self.apart)
        budget = budget.with_noise(self.noise, lambda: self._noise(rounds, rate))
        if self.apart:
            return SpacedRun(budget, self.clip, math.floor(rate * self.members + 1e-9))
        return PrivateRun(self, budget, rate)

    def _noise(self, rounds: int, rate: float) -> float:
        if self.apart:
            return noise_for(self.epsilon, self.delta, -(-rounds // self.apart))
        return noise_for(self.epsilon, self.delta, rounds, rate)


class PrivateRun:
    """A run under way: draws its clients, releases its rounds, and knows when to end."""

    def __init__(self, settings: ClientPrivacy, budget: Budget, rate: float) -> None:
        self.settings, self.budget, self.rate = settings, budget, rate

    @property
    def epsilon(self) -> float:
        """What is spent so far."""
        return self.budget.spent.epsilon(self.budget.delta)

    @property
    def may_go_on(self) -> bool:
        """Whether the budget bears another round."""
        return self.budget.allows(self.budget.noise, self.rate)

    @property
    def expected(self) -> float:
        """How many clients a round expects; its sum is divided by that."""
        return self.rate * self.settings.members

    def made(self, number: int) -> bool:
        """Whether round ``number`` was released before: to be made again, to the bit."""
        charges = self.budget.charges
        return bool(charges) and charges[-1].round >= number

    def drawn(self, number: int, names: Sequence[str]) -> list[bool]:
        """Which of the clients take part in a round: each by itself, with the sampling rate."""
        if self.rate >= 1:
            return [True] * len(names)
        least = math.floor(self.rate * 2**64)
        keys = (
            derive_key(self.budget.seed, "privacy sample", number, name.encode(), length=8)
            for name in names
        )
        return [int.from_bytes(key, "little") < least for key in keys]

    def release(
        self,
        number: int,
        contributions: Sequence[Contribution],
        places: Places,
        names: Sequence[str],
    ) -> Release:
        """Release the noised mean of a round's vectors, charged before it is returned.

        Who they are plays no part. Raises `PrivacyError` where the budget does not bear it.
        """
        settings = self.settings
        norm = self.budget.norm(number, settings.clip)
        made = release(
            contributions,
            places.count,
            self.expected,
            Clipping(norm, self.budget.noise, settings.quantile),
            self.budget.seed,
            number,
        )
        charge = Charge(number, made.commitment, made.noise, self.rate, made.next_norm)
        self.budget = self.budget.charged(charge)
        return made

    def measured(self, made: Release) -> dict[str, Any]:
        """What a round reports; the share of clipped clients is no part of it."""
        return {
            "epsilon": self.epsilon,
            "delta": self.budget.delta,
            "noise": self.budget.noise,
            "rate": self.rate,
            "deviation": made.deviation,
            "next_norm": made.next_norm,
            "releases": len(self.budget.charges),
        }

    def statement(self) -> Mapping[str, Any]:
        """The promise in words and numbers, for cards and reports."""
        sampled = "every client in each round"
        if self.rate < 1:
            sampled = f"Poisson, rate {self.rate:g}"
        return {
            "unit": "a client with all its data",
            "neighbours": "add or remove one client",
            "sampling": sampled,
            "mechanism": "Gaussian noise on the clipped sum, by a trusted server",
            **self.budget.figures(),
        }


def check_number(name: str, value: object, least: float, most: float) -> None:
    """Raise `ConfigError` for what is no number from ``least`` to ``most``."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not least <= value <= most:  # type: ignore[operator]
        raise ConfigError(
            f"privacy: {name} = {value!r}; a number from {least:g} to {most:g} is needed"
        )
