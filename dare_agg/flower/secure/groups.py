"""A robust rule over the sums of groups: where privacy and Byzantine clients meet.

Each group's mean is one vote, whoever is in it: f liars spoil at most f groups, and all groups'
means lie on one mask, so that a rule compares them as it does single clients' updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dare_agg.codec.masked import MaskedSource
from dare_agg.errors import ConfigError
from dare_agg.robust.aggregate import aggregate
from dare_agg.robust.rule import RobustRule
from dare_agg.secure.aggregate import SecureMeasurements
from dare_agg.secure.groups import GroupSum
from dare_agg.secure.private import rescale_of
from dare_agg.secure.result import MergedSum, merged_sum
from dare_agg.secure.roster import Roster
from dare_agg.secure.settings import SecureSettings
from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.sources import array_source


def check_groups(secure: SecureSettings, rule: RobustRule | None, roster: Roster) -> None:
    """Raise `ConfigError` where groups and rule do not go together, or with the roster."""
    check_rule_of_groups(secure.groups, rule)
    secure.check_groups(roster)


def check_rule_of_groups(groups: int, rule: RobustRule | None) -> None:
    """Raise `ConfigError` where so many groups and a rule over them do not go together."""
    if rule is None:
        if groups > 1:
            raise ConfigError(
                f"secure-groups = {groups} without robust: sums of groups show more than one of "
                "all, for nothing; set robust and byzantine, or leave secure-groups out"
            )
        return
    named = f"robust = {str(rule)!r}"
    if groups == 1:
        raise ConfigError(
            f"{named} with secure: a server that sees one sum cannot compare clients; set "
            f"secure-groups = {rule.least} or more, whose sums it compares, or leave one of them "
            "out"
        )
    if rule.beta:
        raise ConfigError(
            f"{named} with secure-groups: a group has no past, as others of it are there each "
            "round; leave momentum out"
        )
    if groups < rule.least:
        raise ConfigError(
            f"{named} bears byzantine = {rule.byzantine} liars, each of whom spoils a group, of at "
            f"least {rule.least} groups, and secure-groups = {groups}; raise it, name a smaller "
            "byzantine, or another rule"
        )


def merge_all(
    sums: Sequence[GroupSum], secure: SecureSettings, rule: RobustRule | None, layout: Layout
) -> tuple[MergedSum, dict[str, Any]]:
    """The merged sums of a round, over ``layout``; where a rule merged groups, what it did."""
    if rule is not None:
        return merge_groups(sums, rule, secure.scaling)
    (one,) = sums
    terms, mask = one.server.terms, one.server.mask
    return merged_sum(one.sums, terms, mask, secure.rule, secure.scaling, layout), {}


def merge_groups(
    found: Sequence[GroupSum], rule: RobustRule, scaling: float
) -> tuple[MergedSum, dict[str, Any]]:
    """Merge the means of groups by ``rule``, each of which counts alike; and what it did.

    Raises `MergeError` for fewer groups than the rule needs, `ProtocolError` (reason "words") for
    sums that no honest parties add up to.
    """
    means = [merged_sum(one.sums, one.server.terms, one.server.mask) for one in found]
    mask = found[0].server.mask
    # What is drawn at random (buckets) is drawn anew each round, and by nobody before the sums.
    seed = np.frombuffer(b"".join(one.server.terms.session for one in found), np.uint32).tolist()
    # As long as the changes they stand for, so that a bound on norms means what it says.
    rescale = rescale_of(mask)
    bodies = [one.delta.values * rescale for one in means if isinstance(one.delta, MaskedSource)]
    body, measured = _voted(bodies, rule, seed)
    body *= np.float32(scaling) / rescale
    heads = [one.dense for one in means if one.dense is not None]
    dense = _voted(heads, rule.without_bounds(), seed)[0] if heads else None
    parties = sum(one.measured.parties for one in means)
    clipped = sum(one.measured.parties * one.measured.clipped_share for one in means) / parties
    shares = measured["shares"]
    usual = 0.5 * sum(shares) / len(shares)
    told = {
        "rule": str(rule),
        "byzantine": rule.byzantine,
        "shared_mask": True,
        "unheard": [
            f"group {one.group}" for one, share in zip(found, shares, strict=True) if share < usual
        ],
    }
    of_all = SecureMeasurements(parties, clipped)
    return MergedSum(MaskedSource(mask, body), dense, of_all), told


def _voted(
    vectors: Sequence[FloatVector], rule: RobustRule, seed: Sequence[int]
) -> tuple[FloatVector, Mapping[str, Any]]:
    """What the rule makes of vectors that count alike, and what it measured of each."""
    sources = [array_source(vector) for vector in vectors]
    found = aggregate(sources, [1.0] * len(sources), rule, seed)
    whole = np.empty(found.delta.size, np.float32)
    found.delta.read(0, whole.size, whole)
    return whole, found.measured
