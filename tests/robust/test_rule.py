"""A rule as it is written: read, refused with a remedy, and how many clients it needs."""

from __future__ import annotations

import pytest

from dare_agg.errors import ConfigError
from dare_agg.robust.rule import check_robust, robust_rule
from dare_agg.robust.stages import STAGES


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("nnm+trimmed-mean", "nnm+trimmed-mean"),
        (" nnm + median ", "nnm+median"),
        ("norm-bound(times=2)", "norm-bound(times=2)+mean"),
        ("norm-bound(times=1)+median", "norm-bound+median"),
        ("norm-bound(limit=1e+3, times=2)+krum", "norm-bound(times=2, limit=1000)+krum"),
        ("momentum(beta=0.5)+norm-bound+bucketing(size=3)+nnm+median",
         "momentum(beta=0.5)+norm-bound+bucketing(size=3)+nnm+median"),
    ],
)  # fmt: skip
def test_a_rule_is_read_and_written(text, written):
    rule = robust_rule(text, 2)
    assert str(rule) == written
    assert robust_rule(str(rule), 2) == rule


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nmm+trimmed-mean", r"'nmm' is unknown; did you mean 'nnm'"),
        ("trimed-mean", r"did you mean 'trimmed-mean'"),
        ("nnm(size=2)+median", r"nnm has no number 'size'"),
        ("bucketing(sizes=2)+median", r"did you mean 'size'"),
        ("bucketing(size=2, size=3)+median", r"size twice"),
        ("bucketing(size=2.5)+median", r"a whole number from 2 to 65536 is needed"),
        ("momentum(beta=1)+median", r"a number from 0 to 0.999 is needed"),
        ("norm-bound(times=nan)+median", r"is needed"),
        ("norm-bound(times=x)+median", r"is no number; write times=2"),
        ("median+nnm", r"nnm cannot follow median; the order is bounds, momentum"),
        ("median+median", r"median cannot follow median"),
        ("nnm+norm-bound+median", r"norm-bound cannot follow nnm"),
        ("mean", r"bears no Byzantine client.*add one of norm-bound, median"),
        ("nnm+mean", r"bears no Byzantine client"),
        ("momentum+bucketing+mean", r"bears no Byzantine client"),
        ("weight-bound+mean", r"bears no Byzantine client"),
        ("nnm median", r"cannot be read; write names joined by \+"),
        ("nnm+", r"cannot be read"),
    ],
)
def test_what_is_no_rule_is_refused_with_a_remedy(text, said):
    with pytest.raises(ConfigError, match=said):
        robust_rule(text, 2)


@pytest.mark.parametrize("byzantine", [0, -1, True, 1.5, "2", 1 << 21])
def test_a_rule_says_how_many_it_bears(byzantine):
    with pytest.raises(ConfigError, match="byzantine = "):
        robust_rule("median", byzantine)


def test_one_word_needs_the_other():
    assert check_robust("", 0) is None
    with pytest.raises(ConfigError, match=r"byzantine = 2 without robust; name the rule"):
        check_robust("", 2)
    with pytest.raises(ConfigError, match=r"say of how many clients"):
        check_robust("median", 0)


@pytest.mark.parametrize(
    ("text", "f", "least"),
    [
        ("median", 2, 5),
        ("nnm+trimmed-mean", 2, 5),
        ("norm-bound", 3, 7),
        ("krum", 2, 7),
        ("nnm+multi-krum", 1, 5),
        # Three of five means are honest, of buckets of two clients each.
        ("bucketing(size=2)+median", 2, 9),
        ("bucketing(size=3)+krum", 1, 13),
    ],
)
def test_it_knows_the_fewest_clients(text, f, least):
    rule = robust_rule(text, f)
    assert rule.least == least
    rule.check_clients(least, "raise it")
    with pytest.raises(ConfigError, match=rf"at least {least} clients a round, and a round may "
                                          rf"have {least - 1}; raise it"):  # fmt: skip
        rule.check_clients(least - 1, "raise it")


def test_only_what_compares_clients_needs_one_mask():
    assert not robust_rule("norm-bound+weight-bound", 2).votes
    assert not robust_rule("norm-bound+momentum", 2).votes
    for name, row in STAGES.items():
        if row.kind in ("rule", "before") and name != "mean":
            assert row.votes, name


def test_every_stage_says_what_it_does_and_whose_it_is():
    for row in STAGES.values():
        assert row.formula
        assert row.reference
        assert (row.combine is None) != (row.elementwise is None) or row.kind != "rule"
