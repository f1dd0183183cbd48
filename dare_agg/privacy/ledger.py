"""The privacy budget of a run: what was released so far, in a file that is written before it is.

The file has the secret seed of the run's noise and sampling, and one entry for each release.
It is replaced on disk before the release leaves the server, so that a crash in between costs
budget and never privacy. A release that is made again after a crash, to the bit, is none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.errors import ConfigError, PrivacyError, StateError
from dare_agg.files.state_file import read_state, write_state
from dare_agg.privacy.accountant import PAID, Spent, spent
from dare_agg.privacy.steps import SpacedStep, read_steps, step_columns

SEED_BYTES = 32
_KIND = "dare-agg privacy budget 1"
_MOST_RELEASES = 1_000_000


@dataclass(frozen=True)
class Charge:
    """One release: its round, what it was of, its noise and sampling, and the norm after it.

    A rate of `dare_agg.privacy.accountant.IN_SHARES` is of noise that parties added in shares.
    """

    round: int
    commitment: bytes
    noise: float
    rate: float
    norm: float


@dataclass(frozen=True)
class Budget:
    """ε at δ, and what was charged to it so far; ``path`` is its file, None for memory alone.

    Of a run whose clients come ``apart`` rounds apart there is a step for each charge.
    """

    epsilon: float
    delta: float
    members: int
    path: Path | None = None
    seed: bytes = field(default_factory=lambda: os.urandom(SEED_BYTES), repr=False)
    noise: float = 0.0
    charges: tuple[Charge, ...] = ()
    apart: int = 0
    steps: tuple[SpacedStep, ...] = ()

    @property
    def spent(self) -> Spent:
        """All that was released."""
        return spent((charge.noise, charge.rate) for charge in self.charges)

    def allows(self, noise: float, rate: float) -> bool:
        """Whether a further release of this noise and sampling rate keeps ε."""
        if rate == PAID:
            return True
        return self.spent.add(noise, rate).epsilon(self.delta) <= self.epsilon

    def charged(self, charge: Charge, step: SpacedStep | None = None) -> Budget:
        """With a release, written before this returns; the very one again costs nothing.

        Where clients come some rounds apart its ``step`` is given. Raises `PrivacyError` where
        the budget does not bear it.
        """
        if self.made_before(charge):
            return self
        if not self.allows(charge.noise, charge.rate):
            raise PrivacyError(
                f"round {charge.round} would spend more than ε = {self.epsilon:g} at δ = "
                f"{self.delta:.2g}, of which {self.spent.epsilon(self.delta):.4g} are spent; the "
                "model so far is what the budget allows"
            )
        steps = self.steps if step is None else (*self.steps, step)
        found = replace(self, charges=(*self.charges, charge), steps=steps)
        found.write()
        return found

    def made_before(self, charge: Charge) -> bool:
        """Whether this very release was made already: rounds made again after a crash."""
        found = (charge.round, charge.commitment)
        return any((one.round, one.commitment) == found for one in self.charges)

    def norm(self, number: int, first: float) -> float:
        """The clipping norm of round ``number``: as the rounds before left it, else ``first``."""
        before = [charge for charge in self.charges if charge.round < number]
        return before[-1].norm if before else first

    def write(self) -> None:
        """Replace the file, if there is one; raises `StateError` where it cannot be written."""
        if self.path is None:
            return
        facts = {
            "kind": _KIND,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "members": self.members,
            "noise": self.noise,
            "seed": self.seed.hex(),
            "apart": self.apart,
        }
        charges = self.charges
        write_state(
            self.path,
            {
                "rounds": np.array([charge.round for charge in charges], np.int64),
                "commitments": np.frombuffer(
                    b"".join(charge.commitment for charge in charges), np.uint8
                ),
                "noises": np.array([charge.noise for charge in charges], np.float64),
                "rates": np.array([charge.rate for charge in charges], np.float64),
                "norms": np.array([charge.norm for charge in charges], np.float64),
                **(step_columns(self.steps) if self.apart else {}),
            },
            facts,
            remedy="nothing was released: free space or fix the permissions, then resume",
        )

    def with_noise(self, given: float, least: Callable[[], float]) -> Budget:
        """With the noise that the run was begun with; at its start ``given``, or ``least()``.

        Raises `ConfigError` where another is given than the run was begun with.
        """
        if not self.noise:
            begun = replace(self, noise=given or least())
            begun.write()
            return begun
        if given and given != self.noise:
            raise ConfigError(
                f"noise = {given:g}, and the run was begun with {self.noise:g}; leave it out to go "
                "on as before"
            )
        return self

    def figures(self) -> dict[str, Any]:
        """The promise in numbers, and what is spent of it."""
        return {
            "epsilon": self.spent.epsilon(self.delta),
            "epsilon_budget": self.epsilon,
            "delta": self.delta,
            "members": self.members,
            "noise_multiplier": self.noise,
            "releases": len(self.charges),
        }

    def check_resumed(self, charges: object) -> None:
        """Raise `PrivacyError` unless the budget knows all releases of the run that goes on."""
        if not isinstance(charges, int) or len(self.charges) < charges:
            known = charges if isinstance(charges, int) else "no"
            raise PrivacyError(
                f"the run had made {known} releases and its privacy budget "
                f"({self.path or 'in memory'}) knows {len(self.charges)}: it was lost, rolled "
                "back or is another run's; put it back, or begin another run with less ε"
            )


def open_budget(
    path: Path | None, epsilon: float, delta: float, members: int, apart: int = 0
) -> Budget:
    """The budget in a file, or a new one where there is none.

    Raises `PrivacyError` for one that was begun with another ε, δ, number of members or of rounds
    between two of a client, or that cannot be read: it is never begun anew by itself.
    """
    if path is None or not path.exists():
        return Budget(epsilon, delta, members, path, apart=apart)
    try:
        arrays, facts = read_state(path)
        budget = _parsed(path, arrays, facts)
    except (StateError, ConfigError, KeyError, TypeError, ValueError) as error:
        raise PrivacyError(
            f"the privacy budget {path} cannot be read ({str(error)[:200]}); what was spent is "
            "not known: put its last good copy back, or begin another run with less ε"
        ) from error
    for what, begun, now in (
        ("ε", budget.epsilon, epsilon),
        ("δ", budget.delta, delta),
        ("a number of members", budget.members, members),
        ("a distance", budget.apart, apart),
    ):
        if begun != now:
            raise PrivacyError(
                f"the privacy budget {path} was begun with {what} of {begun:.6g}, and the run is "
                f"set to {now:.6g}; go on with {begun:.6g}, or begin another run"
            )
    return budget


def _parsed(path: Path, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> Budget:
    if facts.get("kind") != _KIND:
        raise ValueError("it is no privacy budget")
    rounds, commitments = arrays["rounds"], arrays["commitments"].tobytes()
    count = rounds.size
    columns = [arrays[name].astype(np.float64) for name in ("noises", "rates", "norms")]
    if count > _MOST_RELEASES or len(commitments) != 32 * count:
        raise ValueError(f"{len(commitments)} bytes of commitments for {count} releases")
    if any(column.shape != (count,) or not np.isfinite(column).all() for column in columns):
        raise ValueError("its columns differ in length or hold no numbers")
    seed = bytes.fromhex(facts["seed"])
    numbers = [float(facts[name]) for name in ("epsilon", "delta", "noise")]
    if len(seed) != SEED_BYTES or not all(map(math.isfinite, numbers)):
        raise ValueError("its seed or numbers are none")
    charges = tuple(
        Charge(int(number), commitments[32 * i : 32 * i + 32], *(float(c[i]) for c in columns))
        for i, number in enumerate(rounds)
    )
    apart = int(facts.get("apart", 0))
    steps = read_steps(arrays) if apart else ()
    if apart and len(steps) != count:
        raise ValueError(f"{len(steps)} steps for {count} releases")
    epsilon, delta, noise = numbers
    members = int(facts["members"])
    budget = Budget(epsilon, delta, members, path, seed, noise, charges, apart, steps)
    _ = budget.spent  # noises and rates that can be accounted for
    return budget
