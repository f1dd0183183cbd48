"""Parties of several groups send words of their choice, to move the rule over the groups."""

import numpy as np
import pytest
from grouped import grouped, played, servers

from dare_agg.errors import ProtocolError
from dare_agg.flower.secure.groups import merge_groups
from dare_agg.robust.rule import robust_rule

RULE = robust_rule("norm-bound+nnm+trimmed-mean", 1)
GROUPS, EACH = 4, 4


def merged(lies=None, least=RULE.least, rule=RULE):
    """The merged survivors; honest party p has 0.01·p in each, and the honest groups' means."""
    _, groups = grouped(GROUPS * EACH, GROUPS, bits=16)
    server = servers(groups, least)
    found = played(server, groups, {}, lies(groups) if lies else None)
    values = merge_groups(found, rule, 1.0)[0].delta.values
    means = {g: 0.01 * np.mean(group.terms.cohort) for g, group in groups.items()}
    return values, means, server


def adds(amount, fraction=1.0):
    def lie(words):
        words = words.copy()
        words[: int(fraction * (words.size - 2))] += words.dtype.type(amount % (1 << 32))
        return words

    return lie


@pytest.mark.parametrize("amount", [200_000, -200_000, 3_000, -100_000])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_one_liar_makes_its_groups_mean_what_it_likes(amount, fraction):
    """Within the words it may be anything up to clip; the result stays where the others are."""
    values, means, _ = merged(lambda groups: {groups[2].terms.cohort[1]: adds(amount, fraction)})
    others = [mean for group, mean in means.items() if group != 2]
    honest = np.mean(others)
    spread = max(others) - min(others)
    assert np.abs(values - honest).max() < spread + 1e-3


def test_a_mean_of_the_groups_goes_along_with_it():
    rule = robust_rule("norm-bound(times=1000)", 1)
    values, means, _ = merged(lambda g: {g[2].terms.cohort[1]: adds(200_000)}, rule=rule)
    assert np.abs(values - np.mean(list(means.values()))).min() > 0.15


def test_a_liar_that_ends_its_groups_sum_leaves_the_others():
    values, means, server = merged(
        lambda groups: {groups[0].terms.cohort[0]: adds(1 << 19)}, least=RULE.least
    )
    assert server.lost == {0: "words"}
    others = [mean for group, mean in means.items() if group != 0]
    assert min(others) - 1e-3 < values.min() and values.max() < max(others) + 1e-3


def test_as_many_spoilt_sums_as_leave_too_few_leave_the_model_as_it_is():
    with pytest.raises(ProtocolError, match="2 of 4 groups are left"):
        merged(lambda groups: {groups[g].terms.cohort[0]: adds(1 << 19) for g in (0, 3)})
