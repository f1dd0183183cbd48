"""Privacy of whole clients inside a secure sum: what a run is set to, and what it has released.

Promise: what the server sees of a run, sums and all, is (ε, δ)-differentially private. Unit: one
client with all its data. Neighbours: the run with its data and one in which it adds its noise
alone. Trust: those who must stay, less those who may collude, add the noise that is asked of
them. There is no sampling: a server that sees who takes part gains nothing by it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dare_agg.privacy.accountant import (
    IN_SHARES,
    LEAST_NOISE,
    MOST_NOISE,
    check_budget,
    default_delta,
    rho_for,
)
from dare_agg.privacy.clients import check_number
from dare_agg.privacy.ledger import Budget, Charge, open_budget


@dataclass(frozen=True)
class SharedPrivacy:
    """What the members of a roster are promised; checked when made.

    Attributes
    ----------
    epsilon, delta
        the budget; a δ of 0 is members^−1.1, at most a tenth of 1/members. When ε is
        spent the run ends with the model it has.
    clip
        largest norm of a party's survivors, rescaled, with its dense values.
    noise
        noise multiplier: deviation of the noise that is counted, by the norm of
        what a party adds once it is rounded; 0 takes the least with which all rounds keep ε.
    weak
        admit an ε above 50, which promises next to nothing.
    ledger
        file of the budget; without one a run cannot be resumed.
    """

    epsilon: float = 8.0
    delta: float = 0.0
    clip: float = 1.0
    noise: float = 0.0
    weak: bool = False
    ledger: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.delta or default_delta(3), 3, weak=self.weak)
        check_number("clip", self.clip, 1e-9, 1e5)
        if self.noise:
            check_number("noise", self.noise, LEAST_NOISE, MOST_NOISE)

    def among(self, members: int) -> SharedPrivacy:
        """With the δ of so many members; raises `ConfigError` for one that promises nothing."""
        delta = self.delta or default_delta(members)
        check_budget(self.epsilon, delta, members, weak=self.weak)
        return replace(self, delta=delta)

    def begin(self, rounds: int, members: int) -> SharedRun:
        """The run, at the start or where its ledger left it, with the noise of its rounds."""
        settings = self.among(members)
        path = None if self.ledger is None else Path(self.ledger)
        budget = open_budget(path, settings.epsilon, settings.delta, members)

        def least() -> float:
            each = rho_for(settings.epsilon, settings.delta) / rounds * (1 - 1e-9)
            return 1 / math.sqrt(2 * each)

        return SharedRun(settings, budget.with_noise(self.noise, least))


class SharedRun:
    """A run under way: charges its sums before anyone puts data in, and knows when to end."""

    def __init__(self, settings: SharedPrivacy, budget: Budget) -> None:
        self.settings, self.budget = settings, budget

    @property
    def rho(self) -> float:
        """What a sum may cost."""
        return 1 / (2 * self.budget.noise**2)

    @property
    def epsilon(self) -> float:
        """What is spent so far."""
        return self.budget.spent.epsilon(self.budget.delta)

    @property
    def may_go_on(self) -> bool:
        """Whether the budget bears another sum."""
        return self.budget.allows(self.budget.noise, IN_SHARES)

    def charge(self, number: int, session: bytes) -> None:
        """Charge a sum, on disk before this returns; raises `PrivacyError` beyond the budget."""
        charge = Charge(number, session, self.budget.noise, IN_SHARES, self.settings.clip)
        self.budget = self.budget.charged(charge)

    def measured(self) -> dict[str, Any]:
        """What a round reports."""
        return {
            "epsilon": self.epsilon,
            "delta": self.budget.delta,
            "noise": self.budget.noise,
            "releases": len(self.budget.charges),
        }

    def statement(self) -> Mapping[str, Any]:
        """The promise in words and numbers, for cards and reports."""
        return {
            "unit": "a client with all its data",
            "neighbours": "a client's data, or its noise alone",
            "sampling": "none that is counted",
            "mechanism": "discrete Gaussian noise of those who must stay, in a secure sum",
            **self.budget.figures(),
        }
