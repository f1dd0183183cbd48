"""The server sees a sum of each group, and wants to know what single parties learnt."""

import numpy as np
import pytest
from parties import BASE, LAYOUT, consortium

from dare_agg.errors import ProtocolError
from dare_agg.secure import client
from dare_agg.secure.division import divided
from dare_agg.secure.ledger import MemoryLedger
from dare_agg.secure.policy import SecurePolicy

PARTIES, GROUPS, ROUNDS, SIZE = 12, 3, 30, 400


def read_off(divisions) -> float:
    """The mean cosine of what a server makes of all sums with what each party always learns.

    A party learns its own direction in every round, beside what only this round has. The server
    takes the parties' directions for unknowns and the groups' means for equations.
    """
    rng = np.random.default_rng(0)
    own = rng.normal(size=(PARTIES, SIZE))
    equations, means = [], []
    for division in divisions:
        learnt = own + rng.normal(size=own.shape)
        for group in division:
            row = np.zeros(PARTIES)
            row[[party - 1 for party in group]] = 1 / len(group)
            equations.append(row)
            means.append(row @ learnt)
    found = np.linalg.lstsq(np.array(equations), np.array(means), rcond=None)[0]
    return float(np.mean([one @ true / np.linalg.norm(one) / np.linalg.norm(true)
                          for one, true in zip(found, own, strict=True)]))  # fmt: skip


def test_groups_drawn_anew_each_round_single_out_every_party_and_those_of_the_roster_none():
    """So the division is the roster's, once and for all."""
    roster = consortium(PARTIES).roster
    drawn = np.random.default_rng(1)
    anew = [np.array_split(drawn.permutation(PARTIES) + 1, GROUPS) for _ in range(ROUNDS)]
    assert read_off(anew) > 0.85
    # Each is hidden among four: what is read of it is their mean.
    assert read_off([divided(roster, GROUPS)] * ROUNDS) < 0.55


def asked(cohort, groups, party, **policy):
    group = consortium(PARTIES, cohort=sorted(cohort), groups=groups)
    given = SecurePolicy(BASE, LAYOUT, **{"groups": GROUPS, "colluding": 0.0, **policy})
    with pytest.raises(ProtocolError) as caught:
        client.advertise(group.identities[party], group.roster, group.terms, given)
    return caught.value.reason


def test_a_victim_is_put_among_the_servers_own():
    """Whom the server names is no matter: a party knows who is in its group."""
    first, second, _ = divided(consortium(PARTIES).roster, GROUPS)
    assert asked([first[0], *second[:3]], GROUPS, first[0]) == "groups"
    assert asked([*first, second[0]], GROUPS, first[0]) == "groups"


def test_another_number_of_groups_divides_anew():
    """Sums over three groups and then over two are equations again."""
    group = divided(consortium(PARTIES).roster, 2)[0]
    assert asked(group, 2, group[0]) == "groups"
    assert asked(range(1, PARTIES + 1), 1, 1) == "groups"


def test_groups_that_hold_all_who_may_collude():
    """Which members collude nobody knows, so each party counts all of them as its neighbours."""
    group = divided(consortium(PARTIES).roster, GROUPS)[0]
    assert asked(group, GROUPS, group[0], colluding=0.2) == "parties"


def test_what_was_trained_from_a_base_is_summed_over_a_group_and_then_over_all():
    ledger, delta = MemoryLedger(), np.ones(300, np.float32)
    group = divided(consortium(PARTIES).roster, GROUPS)[0]
    training = {"training": b"t" * 32}
    ledger.claim(consortium(PARTIES, cohort=list(group), groups=GROUPS, **training).terms, delta)
    with pytest.raises(ProtocolError) as caught:
        ledger.claim(consortium(PARTIES, run="another", **training).terms, delta + 1)
    assert caught.value.reason == "second-cohort"
