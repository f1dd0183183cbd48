"""The server proposes a graph or a cohort in which single parties stand alone."""

from dataclasses import replace

import pytest
from parties import BASE, LAYOUT, consortium

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ConfigError, ProtocolError
from dare_agg.secure import secure_terms
from dare_agg.secure.graph import COLLUDING, degree_for, is_safe, share_threshold_for
from dare_agg.secure.policy import SecurePolicy, check_terms


def refusal(terms, roster, **policy) -> str:
    with pytest.raises(ProtocolError) as caught:
        check_terms(terms, roster, SecurePolicy(BASE, LAYOUT, **policy))
    return caught.value.reason


@pytest.mark.parametrize("n", [101, 300])
@pytest.mark.parametrize("degree", [2, 4, 10, 24])
def test_few_neighbours_who_drop_out_leave_a_party_alone(n, degree):
    """Degree 2 and two neighbours called dead: only the party's own mask is left, and opened."""
    group = consortium(n, size=20)
    terms = replace(group.terms, degree=degree, share_threshold=share_threshold_for(degree))
    assert refusal(terms, group.roster) == "degree"
    check_terms(group.terms, group.roster, SecurePolicy(BASE, LAYOUT))


@pytest.mark.parametrize("colluding", [0.25, 0.3, 1 / 3])
def test_a_party_that_fears_more_wants_more_neighbours(colluding):
    group = consortium(150, size=20)
    assert refusal(group.terms, group.roster, colluding=colluding) == "degree"
    degree = degree_for(150, colluding)
    more = replace(group.terms, degree=degree, share_threshold=share_threshold_for(degree))
    policy = SecurePolicy(BASE, LAYOUT, colluding=colluding)
    check_terms(more, group.roster, policy)


def test_the_chosen_degree_is_safe_with_a_third_gone_and_no_smaller_one_is():
    for n in (101, 200, 1000):
        degree = degree_for(n)
        assert is_safe(n, degree, share_threshold_for(degree), COLLUDING, n // 3)
        less = degree // 2
        assert not is_safe(n, less, share_threshold_for(less), COLLUDING, n // 3)


def test_two_colluders_and_a_victim_of_a_roster_of_a_hundred():
    """The sum of three minus their own two is the victim's delta."""
    group = consortium(100, size=20)
    terms = secure_terms(
        run="r", round_number=0, roster=group.roster.digest, cohort=[1, 99, 100],
        base=BASE, layout=LAYOUT, size=20, drop_rate=parse_drop_rate("0"), bits=8, clip=1.0,
    )  # fmt: skip
    assert refusal(terms, group.roster) == "parties"
    # Half of the roster is not more than half.
    half = replace(group.terms, cohort=tuple(range(1, 51)), threshold=34, degree=49,
                   share_threshold=34)  # fmt: skip
    assert refusal(half, group.roster) == "parties"
    # A party that lets small cohorts in still counts the honest ones among those who stay.
    assert refusal(terms, group.roster, min_cohort_share=0.0) == "parties"


def test_the_honest_minimum_counts_who_stays_not_who_was_asked():
    group = consortium(10, size=20, threshold=7)
    policy = {"colluding": 0.3, "min_parties": 4}
    check_terms(group.terms, group.roster, SecurePolicy(BASE, LAYOUT, **policy))
    assert refusal(group.terms, group.roster, **{**policy, "min_parties": 5}) == "parties"


def test_more_than_a_third_colluding_is_a_setting_that_cannot_be():
    with pytest.raises(ConfigError, match="from 0 to 1/3"):
        degree_for(200, 0.5)
