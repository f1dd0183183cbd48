"""Secure sums over groups of a roster: the division, the terms, what a party insists on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from grouped import grouped, played, servers
from parties import BASE, LAYOUT, Consortium, consortium, seeded

from dare_agg.errors import ConfigError, ProtocolError
from dare_agg.secure import client
from dare_agg.secure.division import among, divided, own_group
from dare_agg.secure.groups import GroupedServer
from dare_agg.secure.packing import merge_sums
from dare_agg.secure.policy import SecurePolicy, check_terms
from dare_agg.secure.server import SecureServer
from dare_agg.secure.settings import SecureSettings
from dare_agg.secure.terms import decode_terms


@pytest.mark.parametrize(("n", "groups"), [(9, 3), (10, 3), (20, 5), (31, 7), (5, 1)])
def test_every_member_is_in_one_group_and_sizes_are_one_apart(n: int, groups: int) -> None:
    roster = consortium(n).roster
    found = divided(roster, groups)
    assert sorted(p for group in found for p in group) == list(range(1, n + 1))
    sizes = [len(group) for group in found]
    assert max(sizes) - min(sizes) <= 1
    assert all(own_group(roster, groups, p) == group for group in found for p in group)
    assert divided(roster, groups) == found
    with pytest.raises(ProtocolError, match="not in roster"):
        own_group(roster, groups, n + 1)


def test_the_roster_alone_divides() -> None:
    roster = consortium(20).roster
    assert divided(replace(roster, serial=2), 5) != divided(roster, 5)
    assert divided(replace(roster, signatures=((b"k" * 32, b"s" * 64),)), 5) == divided(roster, 5)
    assert among([(1, 2), (3, 4), (5, 6)], [2, 3, 4]) == {0: [2], 1: [3, 4]}


def test_terms_say_their_groups_and_those_of_one_are_as_they_were() -> None:
    _, sums = grouped(12, 3)
    terms = sums[1].terms
    assert decode_terms(terms.encode()) == terms
    whole = replace(terms, groups=1)
    assert terms.encode() == whole.encode() + (3).to_bytes(4, "little")
    for written in (0, 1, 1 << 30):
        with pytest.raises(ProtocolError):
            decode_terms(whole.encode() + written.to_bytes(4, "little"))
    with pytest.raises(ConfigError, match="the mean"):
        replace(terms, aggregate="ties")


def test_all_groups_of_a_round_have_one_mask_and_rounds_have_others() -> None:
    _, sums = grouped(12, 3)
    first, second, third = (group.terms for group in sums.values())
    masks = [terms.mask(bytes([i]) * 32).key for i, terms in enumerate((first, second, third))]
    assert len(set(masks)) == 1
    for other in ({"run": "b"}, {"round": 2}, {"base": "12" * 32}, {"groups": 4}):
        assert replace(first, **other).mask(b"0" * 32).key != masks[0]
    # Of one sum over all it is the parties' nonces that draw it, as ever.
    whole = replace(first, groups=1)
    assert whole.mask(b"0" * 32).key != whole.mask(b"1" * 32).key


def refusal(group: Consortium, **policy: Any) -> str:
    party = group.terms.cohort[0]
    given = SecurePolicy(BASE, LAYOUT, **policy)
    with pytest.raises(ProtocolError) as caught:
        client.advertise(group.identities[party], group.roster, group.terms, given, seeded(1))
    return caught.value.reason


def test_a_party_takes_part_in_groups_only_where_it_says_so() -> None:
    _, sums = grouped(12, 3)
    given = {"groups": 3, "colluding": 0.0}
    for group in sums.values():
        policy = SecurePolicy(BASE, LAYOUT, **given)
        for party in group.terms.cohort:
            client.advertise(group.identities[party], group.roster, group.terms, policy)
    assert refusal(sums[0], colluding=0.0) == "groups"
    assert refusal(sums[0], **{**given, "groups": 4}) == "groups"
    assert refusal(consortium(12), **given) == "groups"


def test_all_who_may_collude_may_be_in_the_own_group() -> None:
    """Twenty parties, of whom two may collude: of a group of four that stays in three, one is
    left; of a group of six, five stay and three are."""
    _, small = grouped(20, 5)
    assert refusal(small[0], groups=5, colluding=0.1) == "parties"
    _, large = grouped(18, 3)
    policy = SecurePolicy(BASE, LAYOUT, groups=3, colluding=2 / 18)
    check_terms(large[0].terms, large[0].roster, policy)
    assert refusal(large[0], groups=3, colluding=3 / 18) == "parties"


def test_half_of_a_group_is_too_few_whatever_the_whole_is() -> None:
    _, sums = grouped(24, 3)
    few = list(sums[0].terms.cohort[:4])
    assert refusal(consortium(24, cohort=few, groups=3), groups=3, colluding=0.0) == "parties"


def test_each_group_has_the_mean_of_its_own() -> None:
    _, groups = grouped(12, 3, bits=16)
    server = servers(groups, 3)
    found = played(server, groups, {})
    assert [one.group for one in found] == [0, 1, 2] and server.alive == tuple(range(1, 13))
    for one in found:
        values = merge_sums(one.sums, one.server.terms.quantiser)[0]
        assert np.allclose(values, 0.01 * np.mean(one.server.terms.cohort), atol=1e-4)
    with pytest.raises(ProtocolError, match="in no group"):
        server.of(13)


@pytest.mark.parametrize("stage", ["adverts", "shares", "vectors", "signatures", "reveals"])
def test_a_group_that_ends_does_not_sink_the_others(stage: str) -> None:
    _, groups = grouped(16, 4)
    server = servers(groups, 3)
    gone = set(groups[2].terms.cohort[:2])
    found = played(server, groups, {stage: gone})
    assert [one.group for one in found] == [0, 1, 3]
    assert server.lost == {2: "threshold"}
    assert not set(groups[2].terms.cohort) & set(server.alive)
    one_of_another = servers(groups, 4)
    with pytest.raises(ProtocolError, match=r"3 of 4 groups are left \(group 2: threshold\)"):
        played(one_of_another, groups, {stage: gone})


def test_words_no_honest_party_adds_up_to_end_one_group_alone() -> None:
    _, groups = grouped(12, 3)
    liar = groups[1].terms.cohort[0]
    server = servers(groups, 2)
    found = played(server, groups, {}, {liar: lambda words: words + words.dtype.type(1 << 10)})
    assert [one.group for one in found] == [0, 2] and server.lost == {1: "words"}


def test_too_few_groups_do_not_begin() -> None:
    _, groups = grouped(12, 3)
    with pytest.raises(ProtocolError, match="0 of 1 groups are left"):
        GroupedServer({}, 1, {0: "parties"})
    two = {number: SecureServer(groups[number].terms, groups[number].roster) for number in (0, 2)}
    with pytest.raises(ProtocolError, match=r"2 of 3 .*group 1: parties.*needs 3"):
        GroupedServer(two, 3, {1: "parties"})


def test_settings_know_the_smallest_group() -> None:
    roster = consortium(11).roster
    assert SecureSettings(groups=3).fewest(roster, 3) == 9
    assert SecureSettings(groups=3).fewest(roster, 2) == 6
    assert SecureSettings().fewest(roster) == 6
    # Two of four are too few of a group; of one sum over all the strategy counts itself.
    two = SecureSettings(groups=2)
    assert two.cohorts([(1, 3, 5, 7), (2, 4, 6)], [1, 2, 3, 4, 6]) == {1: [2, 4, 6]}
    assert SecureSettings().cohorts([(1, 2, 3, 4)], [2]) == {0: [2]}
    SecureSettings(groups=3).check_groups(roster)
    with pytest.raises(ConfigError, match="set secure-groups = 3 or fewer"):
        SecureSettings(groups=4).check_groups(roster)
    with pytest.raises(ConfigError, match="set secure = mean"):
        SecureSettings("ties", groups=3)
    for groups in (0, -1, 1 << 20):
        with pytest.raises(ConfigError, match="secure-groups"):
            SecureSettings(groups=groups)


def test_two_sets_of_the_living_that_colluders_could_both_sign() -> None:
    """51 of a roster of 100, all of whose 20 colluders the server has asked: 35 of 51 must stay,
    and 15 and 16 honest ones with the 20 sign two sets."""
    group = consortium(100, cohort=list(range(1, 52)))
    assert group.terms.threshold == 35
    with pytest.raises(ProtocolError, match="36 are wanted") as caught:
        check_terms(group.terms, group.roster, SecurePolicy(BASE, LAYOUT))
    assert caught.value.reason == "threshold"
    more = consortium(100, cohort=list(range(1, 52)), threshold=36)
    check_terms(more.terms, more.roster, SecurePolicy(BASE, LAYOUT))
