"""A party's own limit on what noised sums may tell of it, whatever the server promises.

Each vector is charged to the party's ledger (`dare_agg.privacy.record_ledger`) before it leaves,
at what it costs by this party's own count: the noise of those who must stay, less those of the
roster who may collude.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dare_agg.errors import ConfigError, PrivacyError
from dare_agg.privacy.accountant import IN_SHARES, check_budget
from dare_agg.privacy.record_ledger import RecordCharge, RecordLedger, open_ledger
from dare_agg.secure.graph import corrupt_of
from dare_agg.secure.private import released
from dare_agg.secure.roster import Roster
from dare_agg.secure.terms import SecureTerms

# What a party that says nothing lets all runs together spend.
USUAL_EPSILON = 8.0


def honest_parties(threshold: int, members: int, colluding: float) -> int:
    """Of those who must stay, how many keep their noise to themselves."""
    return threshold - min(corrupt_of(members, colluding), threshold)


@dataclass(frozen=True)
class PrivacyGuard:
    """Where a party keeps its budget, and what it allows.

    ``epsilon`` and ``delta`` are its own, over all runs; 0 takes the run's, ε at most
    `USUAL_EPSILON` but for a party of a ``practice`` run, which ends with its keys. One that
    ``insists`` takes part in no sum without noise.
    """

    path: Path
    marks: Path
    epsilon: float = 0.0
    delta: float = 0.0
    colluding: float = 0.0
    insists: bool = False
    practice: bool = False

    def check(self, terms: SecureTerms, roster: Roster, party: int) -> None:
        """Refuse terms that this party's budget does not bear, before anything is trained.

        Raises `PrivacyError`.
        """
        if not terms.variance:
            if self.insists:
                raise PrivacyError(
                    "the terms have no noise, and this party takes part in noised sums alone "
                    "(secure-epsilon in its node config); set dp = clients, or leave that out"
                )
            return
        ledger = self._ledger(terms, roster, party)
        ledger.check(self._charge(terms, roster), terms.epsilon, self._bound(terms))

    def charge(self, terms: SecureTerms, roster: Roster, party: int) -> None:
        """Charge a vector, on disk before this returns; raises `PrivacyError` beyond the budget."""
        if terms.variance:
            with self._ledger(terms, roster, party).alone() as held:
                held.charged(self._charge(terms, roster), terms.epsilon, self._bound(terms))

    def _bound(self, terms: SecureTerms) -> float:
        if self.epsilon or self.practice:
            return self.epsilon or terms.epsilon
        return min(terms.epsilon, USUAL_EPSILON)

    def _ledger(self, terms: SecureTerms, roster: Roster, party: int) -> RecordLedger:
        delta = self.delta or terms.delta
        try:
            check_budget(self._bound(terms), delta, len(roster.members), weak=True)
        except ConfigError as error:
            raise PrivacyError(f"terms refused: {error}") from error
        name = f"secure {roster[party].name}"
        return open_ledger(self.path, self.marks, name, delta, bool(self.delta), "secure")

    def _charge(self, terms: SecureTerms, roster: Roster) -> RecordCharge:
        honest = honest_parties(terms.threshold, len(roster.members), self.colluding)
        if honest < 1:
            raise PrivacyError(
                f"{terms.threshold} parties that stay, all of whom may collude: no noise is left "
                "that they do not know (secure-colluding, secure-threshold)"
            )
        rho = released(terms.quantiser.top, terms.values, terms.variance, honest)
        try:
            noise = 1 / math.sqrt(2 * rho)
            charge = RecordCharge(terms.run, terms.session, 0, noise, IN_SHARES, 1)
            _ = RecordLedger("", 0.5, self.path, self.marks, charges=(charge,)).spent
        except (ConfigError, OverflowError, ZeroDivisionError) as error:
            raise PrivacyError(
                f"noise of variance {terms.variance} at each of {honest} parties promises "
                f"nothing: ρ = {rho:.3g}; {error}"
            ) from error
        return charge
