"""What a party insists on before it takes part in a secure sum."""

from __future__ import annotations

from dataclasses import dataclass

from dare_agg.errors import ProtocolError
from dare_agg.secure.aggregates import AGGREGATES
from dare_agg.secure.division import own_group
from dare_agg.secure.graph import COLLUDING, corrupt_of, is_safe
from dare_agg.secure.roster import Roster
from dare_agg.secure.terms import MIN_PARTIES, SecureTerms


@dataclass(frozen=True)
class SecurePolicy:
    """What a party insists on, whatever the server proposes.

    ``base`` and ``layout`` are the party's own fingerprints (hex). ``min_threshold_share``
    is the least share of the cohort that must stay: two thirds withstand a third colluding
    with a server that shows parties different alive sets, half withstand nobody.

    The server chooses the cohort, so all of the ``colluding`` share of the *roster* may be in
    it. What is left of those who must stay has to be ``min_parties`` honest ones, and the
    cohort more than ``min_cohort_share`` of the roster; of the own group, where it takes part in
    sums over ``groups`` of them, any of which may hold all who collude.
    """

    base: str
    layout: str
    min_parties: int = MIN_PARTIES
    min_threshold_share: float = 2 / 3
    min_cohort_share: float = 0.5
    colluding: float = COLLUDING
    aggregates: tuple[str, ...] = tuple(AGGREGATES)
    max_clip: float = 1.0
    groups: int = 1


def check_terms(terms: SecureTerms, roster: Roster, policy: SecurePolicy) -> None:
    """Raise `ProtocolError` where the terms break what this party insists on."""
    n, members = len(terms.cohort), len(roster.members)
    corrupt = min(corrupt_of(members, policy.colluding), n)
    honest = terms.threshold - corrupt
    # The largest group there is: sizes are one apart.
    of = -(-members // terms.groups)
    refusals = (
        (terms.roster != roster.digest, "roster", "another roster than this party's"),
        (
            terms.base != policy.base,
            "base",
            f"base {terms.base[:12]}…, here {policy.base[:12]}…: all need the same base model",
        ),
        (terms.layout != policy.layout, "layout", "another layout than this party's model"),
        (
            terms.groups != policy.groups,
            "groups",
            f"sums over {terms.groups} groups, this party takes part in those over "
            f"{policy.groups} (secure-groups)",
        ),
        (
            n <= policy.min_cohort_share * of,
            "parties",
            f"{n} of the {of} parties of {'a group' if terms.groups > 1 else 'the roster'}, more "
            f"than {policy.min_cohort_share:.3g} of them wanted (secure-min-cohort)",
        ),
        (
            terms.threshold < policy.min_threshold_share * n,
            "threshold",
            f"threshold {terms.threshold} of {n}, at least {policy.min_threshold_share:.3g} of "
            "the cohort wanted (secure-min-threshold)",
        ),
        (
            honest < policy.min_parties,
            "parties",
            f"{terms.threshold} parties that stay, of whom {corrupt} may collude; at least "
            f"{policy.min_parties} honest ones wanted (secure-min-parties, secure-colluding)",
        ),
        (
            2 * terms.threshold <= n + corrupt,
            "threshold",
            f"threshold {terms.threshold} of {n} parties, of whom {corrupt} may collude: two sets "
            f"of the living could both be signed; {(n + corrupt) // 2 + 1} are wanted "
            "(secure-threshold, secure-colluding)",
        ),
        (
            not is_safe(
                n, terms.degree, terms.share_threshold, policy.colluding, n - terms.threshold
            ),
            "degree",
            f"{terms.degree} neighbours, {terms.share_threshold} of whom open a secret, are too "
            f"few with {policy.colluding:.3g} of {n} parties colluding (secure-colluding)",
        ),
        (
            terms.aggregate not in policy.aggregates,
            "aggregate",
            f"{terms.aggregate}, this party takes part in {', '.join(policy.aggregates)}",
        ),
        # Of a noised sum the clip is the norm of a whole vector, and its noise follows it.
        (
            terms.clip > policy.max_clip and not terms.variance,
            "clip",
            f"clip {terms.clip}, at most {policy.max_clip}",
        ),
    )
    for bad, reason, why in refusals:
        if bad:
            raise ProtocolError(f"terms refused: {why}", reason=reason)
    for member in terms.cohort:
        _ = roster[member]


def check_group(terms: SecureTerms, roster: Roster, party: int) -> None:
    """Raise `ProtocolError` (reason "groups") for a cohort of others than the party's group."""
    if terms.groups == 1:
        return
    strangers = terms.members - set(own_group(roster, terms.groups, party))
    if strangers:
        raise ProtocolError(
            f"terms refused: parties {sorted(strangers)[:8]} of the cohort are of another group "
            f"than party {party} where the roster is divided by {terms.groups}",
            reason="groups",
        )
