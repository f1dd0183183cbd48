"""Privacy of records, kept by each party for itself: what it is set to, and one training of it.

Promise: what leaves the party, the model it trained in each round, is (ε, δ)-differentially
private. Unit: one row of its training data. Neighbours: with the row and without it. How many
rows there are counts as known. Trust: nobody; the party draws its batches and its noise from a
seed that stays in its ledger.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dare_agg.codec.derive import derive_key
from dare_agg.errors import ConfigError, PrivacyError
from dare_agg.privacy.accountant import (
    LEAST_NOISE,
    MOST_NOISE,
    Spent,
    check_budget,
    default_delta,
    noise_beside,
)
from dare_agg.privacy.clients import check_number
from dare_agg.privacy.gradients import MOST_MULTIPLIER
from dare_agg.privacy.record_ledger import RecordCharge, RecordLedger

# A budget of which this share is spent bears no further run.
_ALL = 0.98


@dataclass(frozen=True)
class RecordPrivacy:
    """What a run promises each party's rows; checked when made.

    Attributes
    ----------
    epsilon, delta
        what the run may spend of a party's budget; a δ of 0 is rows^−1.1, at most a
        tenth of 1/rows.
    clip
        largest norm of one row's gradient, over all that is trained.
    noise
        noise multiplier, standard deviation by norm; 0 takes the least with which all rounds
        of the run keep ε.
    weak
        admit an ε above 50, which promises next to nothing.
    most
        the most that all runs together may spend of the party's budget, which it says
        itself; 0: no more than this run.
    """

    epsilon: float = 8.0
    delta: float = 0.0
    clip: float = 1.0
    noise: float = 0.0
    weak: bool = False
    most: float = 0.0

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.delta or default_delta(2), 2, weak=self.weak)
        check_number("clip", self.clip, 1e-9, 1e9)
        if self.noise:
            check_number("noise", self.noise, LEAST_NOISE, min(MOST_NOISE, MOST_MULTIPLIER))
        if self.most:
            check_number("the party's dp-epsilon", self.most, 1e-6, 1e6)

    @property
    def bound(self) -> float:
        """ε of all that a party releases, in this run and others."""
        return self.most or self.epsilon

    def settled_delta(self, rows: int) -> float:
        """δ among so many rows; raises `ConfigError` for numbers that promise nothing."""
        if rows < 2:
            raise ConfigError(f"privacy of records among {rows} rows; at least 2 are needed")
        delta = self.delta or default_delta(rows)
        check_budget(self.epsilon, delta, rows, weak=self.weak)
        return delta


@dataclass(frozen=True)
class Sitting:
    """One training of a party: of which run, how it samples, and of what it is the only one.

    ``run`` names the run and its method, ``what`` all that decides the training besides the data
    (round, model, settings), ``steps_left`` how many steps the run has from here on.
    """

    run: str
    what: bytes
    rows: int
    batch: int
    steps: int
    steps_left: int

    @property
    def rate(self) -> float:
        """Share of the rows that a step draws: at 1, and above, all of them."""
        return min(1.0, self.batch / self.rows)

    def packed(self) -> bytes:
        """All of it, canonically, but for how long the run goes on."""
        numbers = np.array([self.rows, self.batch, self.steps], "<i8").tobytes()
        words = (self.run.encode(), self.what, numbers)
        return b"".join(hashlib.sha256(word).digest() for word in words)


@dataclass(frozen=True)
class Permit:
    """A training that the ledger bears, charged already: its noise, and the key of its draws."""

    ledger: RecordLedger
    charge: RecordCharge
    privacy: RecordPrivacy

    @property
    def key(self) -> bytes:
        """The secret of this training's batches and noise."""
        charge = self.charge
        return derive_key(self.ledger.seed, "record training", charge.attempt, charge.commitment)

    def settle(self, result: bytes) -> bool:
        """Note what the training made, by its SHA-256, before it is sent; whether it may be.

        A training that was made before, to the bit, is no second release. Another result under
        the same charge (other data, another machine) may not be sent: it needs a charge, and
        draws, of its own.
        """
        return self.ledger.settled(self.charge, result)

    def measured(self) -> dict[str, float]:
        """What the party tells of its budget."""
        ledger = self.ledger.read_again()
        return {
            "privacy-epsilon": ledger.spent.epsilon(ledger.delta),
            "privacy-delta": ledger.delta,
            "privacy-noise": self.charge.noise,
        }


def permit(ledger: RecordLedger, privacy: RecordPrivacy, sitting: Sitting) -> Permit:
    """Charge a training to a party's ledger, on disk before this returns.

    One that was charged and never sent (a crash) is not charged again, nor one that is made
    again to the bit. Raises `PrivacyError` where ε does not bear it: nothing is trained then.
    """
    with ledger.alone() as held:
        run = sitting.run
        begun = held.noises.get(run)
        if begun is not None and privacy.noise and privacy.noise != begun:
            raise ConfigError(
                f"dp-noise = {privacy.noise:g}, and the run was begun with {begun:g}; leave it out "
                "to go on as before"
            )
        noise = begun or privacy.noise or _noise(held, privacy, sitting)
        commitment = hmac.digest(held.seed, sitting.packed(), "sha256")
        known = held.last_of(commitment)
        if known is not None:
            return Permit(held, known, privacy)
        charge = RecordCharge(run, commitment, 0, noise, sitting.rate, sitting.steps)
        return Permit(held.charged(charge, privacy.epsilon, privacy.bound), charge, privacy)


def permit_anew(before: Permit) -> Permit:
    """Charge a training again whose result was another than the one that was sent before."""
    with before.ledger.alone() as held:
        old = before.charge
        charge = RecordCharge(
            old.run, old.commitment, held.count_of(old.commitment), old.noise, old.rate, old.steps
        )
        privacy = before.privacy
        return Permit(held.charged(charge, privacy.epsilon, privacy.bound), charge, privacy)


def _noise(ledger: RecordLedger, privacy: RecordPrivacy, sitting: Sitting) -> float:
    """The least noise with which the run's steps keep its ε, and all runs the party's."""
    own = (Spent(), privacy.epsilon)
    whole = (ledger.spent, privacy.bound)
    noise = 0.0
    for already, epsilon in (own, whole) if ledger.charges else (own,):
        if already.epsilon(ledger.delta) > _ALL * epsilon:
            raise PrivacyError(
                f"the budget of party {ledger.party!r} is spent: ε = "
                f"{already.epsilon(ledger.delta):.4g} of {epsilon:g} at δ = {ledger.delta:.2g}; "
                "nothing is trained. Only the party can allow more: dp-epsilon in its node config"
            )
        found = noise_beside(already, epsilon, ledger.delta, sitting.steps_left, sitting.rate)
        noise = max(noise, found)
    if noise > MOST_MULTIPLIER:
        raise PrivacyError(
            f"what is left of party {ledger.party!r}'s ε bears no training: it would take noise of "
            f"{noise:.4g} times the norm; fewer rounds or steps, or a larger dp-epsilon in its "
            "node config"
        )
    return noise


def statement(privacy: RecordPrivacy, told: Mapping[str, float], unit: str) -> Mapping[str, Any]:
    """The promise in words and numbers, for cards; ``told`` is the most that any party said."""
    said = {
        "unit": unit,
        "neighbours": "add or remove one",
        "sampling": "Poisson, each step, batch/rows of the party",
        "mechanism": "DP-SGD at each party: Gaussian noise on sums of clipped gradients",
        "epsilon": told.get("epsilon"),
        "epsilon_budget": privacy.epsilon,
        "delta": told.get("delta"),
    }
    return {key: value for key, value in said.items() if value is not None}
