"""Privacy of clients who come b rounds apart: nobody is sampled, and rounds share their noise.

Promise: what the run releases is (ε, δ)-differentially private. Unit: one client with all its data.
Neighbours: the run with its data, and the run in which it takes part with nothing; who takes part
is no secret. Trust: the server, as in `dare_agg.privacy.clients`, keeps clients apart.

The budget has each release's clients and places: noise is drawn anew from them after a crash,
and a client is never taken in too early. A round that is made again after a crash is another
release, with other clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dare_agg.codec.derive import derive_key
from dare_agg.errors import PrivacyError
from dare_agg.privacy.accountant import PAID
from dare_agg.privacy.banded import Added, Places, length, shared
from dare_agg.privacy.central import Clipping, Contribution, Release, fresh_noise, release
from dare_agg.privacy.ledger import Budget, Charge
from dare_agg.privacy.steps import SpacedStep, mark


class SpacedRun:
    """A run under way: chooses its clients, releases its rounds, and knows when to end.

    ``expected`` clients are asked in each round, and its sum is divided by that.
    """

    def __init__(self, budget: Budget, clip: float, expected: int) -> None:
        self.budget, self.clip, self.expected = budget, clip, expected
        self._before = self._replayed()

    @property
    def epsilon(self) -> float:
        """What is spent so far."""
        return self.budget.spent.epsilon(self.budget.delta)

    @property
    def may_go_on(self) -> bool:
        """Whether the budget bears another round."""
        return self.budget.allows(self.budget.noise, self._rate)

    def made(self, number: int) -> bool:
        """Whether round ``number`` would be no release: never, it is made with others."""
        return False

    def drawn(self, number: int, names: Sequence[str]) -> list[bool]:
        """Which of the clients take part in a round: of those who may, who waited longest.

        Among those who waited alike a draw decides; one who is there twice is taken once.
        """
        came = {who: at for at, step in enumerate(self.budget.steps) for who in step.who}
        marks = [mark(name) for name in names]
        at = len(self.budget.steps)
        free = {who for who in marks if at - came.get(who, -self.budget.apart) >= self.budget.apart}

        def waiting(who: bytes) -> tuple[int, bytes]:
            return came.get(who, -1), derive_key(self.budget.seed, "privacy choice", at, who)

        left = set(sorted(free, key=waiting)[: self.expected])
        found = []
        for who in marks:
            found.append(who in left)
            left.discard(who)
        return found

    def release(
        self,
        number: int,
        contributions: Sequence[Contribution],
        places: Places,
        names: Sequence[str],
    ) -> Release:
        """Release the noised mean of a round's vectors, charged before it is returned.

        ``names`` are theirs, one each. Raises `PrivacyError` where the budget does not bear it, and
        where a client took part less than the promised number of rounds ago.
        """
        budget = self.budget
        if len(names) != len(contributions):
            raise PrivacyError(
                f"{len(contributions)} vectors of {len(names)} clients by name: who takes part has "
                "to be known, for rounds to be kept apart; give a name for each"
            )
        step = SpacedStep(places, tuple(mark(name) for name in names))
        recent = {who for old in self._recent for who in old.who}
        for name, who in zip(names, step.who, strict=True):
            if who in recent:
                raise PrivacyError(
                    f"client {name!r} takes part twice within {budget.apart} rounds, which its "
                    "noise does not bear: leave the choice of clients to the strategy"
                )
            recent.add(who)
        added: list[Added] = []

        def shape(fresh: Any) -> Any:
            added.append(shared(fresh, places, self._before))
            return added[0].values

        at = len(budget.steps)
        noise = budget.noise * length(budget.apart)
        clipping = Clipping(self.clip, noise)
        count = places.count
        made = release(contributions, count, self.expected, clipping, budget.seed, at, shape)
        charge = Charge(at, made.commitment, budget.noise, self._rate, self.clip)
        self.budget = budget.charged(charge, step)
        self._before = _latest([*self._before, *added], budget.apart)
        return made

    @property
    def _rate(self) -> float:
        """A client can have come ⌈steps/apart⌉ times: the first step of each so many is charged."""
        return PAID if len(self.budget.steps) % self.budget.apart else 1.0

    @property
    def _recent(self) -> Sequence[SpacedStep]:
        """The steps within which nobody comes again."""
        return self.budget.steps[max(0, len(self.budget.steps) - self.budget.apart + 1) :]

    def _replayed(self) -> list[Added]:
        """The noise of the recent steps, drawn again as it was."""
        budget = self.budget
        before: list[Added] = []
        for at, (step, charge) in enumerate(zip(budget.steps, budget.charges, strict=True)):
            count = step.places.count
            fresh = fresh_noise(budget.seed, at, charge.commitment, count + 1)[:count]
            before = _latest([*before, shared(fresh, step.places, before)], budget.apart)
        return before

    def measured(self, made: Release) -> dict[str, Any]:
        """What a round reports; the share of clipped clients is no part of it."""
        return {
            "epsilon": self.epsilon,
            "delta": self.budget.delta,
            "noise": self.budget.noise,
            "apart": self.budget.apart,
            "deviation": made.deviation,
            "next_norm": self.clip,
            "releases": len(self.budget.charges),
        }

    def statement(self) -> Mapping[str, Any]:
        """The promise in words and numbers, for cards and reports."""
        return {
            "unit": "a client with all its data",
            "neighbours": "a client's data, or nothing in its place",
            "sampling": f"none; a client takes part once in {self.budget.apart} rounds at most",
            "mechanism": "Gaussian noise shared by rounds (banded matrix), by a trusted server",
            **self.budget.figures(),
        }


def _latest(noises: list[Added], apart: int) -> list[Added]:
    """The last ``apart`` − 1."""
    return noises[max(0, len(noises) - apart + 1) :]
