"""robust and byzantine in the run config: refused, with a remedy, before anything starts."""

from __future__ import annotations

import pytest

from dare_agg.errors import ConfigError
from server.app import make_strategy
from server.reading import read_config

DEFAULT = {"robust": "norm-bound+nnm+trimmed-mean", "byzantine": 2, "min-clients": 10}


def test_a_rule_is_taken():
    config = read_config(DEFAULT)
    assert (config.robust, config.byzantine) == (DEFAULT["robust"], 2)
    assert read_config({}).robust == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"robust": "nmm+median"}, "did you mean 'nnm'"),
        ({"robust": ""}, "byzantine = 2 without robust"),
        ({"byzantine": 0}, "say of how many clients"),
        ({"byzantine": -1}, "byzantine = -1"),
        ({"byzantine": 5}, "at least 11 clients a round, and a round may have 10; raise min-cli"),
        ({"fraction-train": 0.4}, "may have 4; raise min-clients"),
        ({"methods": "dare-ties,dare-average"}, "with dare-ties: the rule takes the place"),
        ({"methods": "dare-regmean"}, "with dare-regmean"),
        ({"keep-rates": "own"}, "keep-rates = own keep others of each"),
        ({"upload-budget": "300kB", "upload-seconds": 3.0}, "upload-seconds gives each its own"),
        ({"robust": "momentum+median", "base": "base"}, "leave momentum out"),
        ({"train": "lora", "lora-merge": "product"}, "set lora-merge = factors"),
    ],
)
def test_what_cannot_be_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        read_config({**DEFAULT, **words})


def test_a_bound_alone_goes_with_any_method():
    assert read_config({**DEFAULT, "robust": "norm-bound", "methods": "dare-ties"}).robust


def test_the_strategy_is_made_with_it(tmp_path):
    config = read_config({**DEFAULT, "methods": "fedavg,dare-task-arithmetic"})
    for name in config.methods:
        strategy = make_strategy(config, name, lambda outcome: None, tmp_path)
        assert str(strategy.settings.robust) == DEFAULT["robust"]
        assert strategy.settings.shared_mask
        assert strategy.min_replies == 5


SECURE = {**DEFAULT, "secure": "mean", "secure-roster": "roster.json", "secure-groups": 5}


def test_a_rule_over_the_sums_of_groups_is_taken():
    config = read_config({**SECURE, "min-clients": 3})
    assert config.secure_settings().groups == 5
    # Means of groups lie on one mask, and its rates are one round's.
    assert read_config({**SECURE, "keep-rates": "last"}).secure_settings().keep_rates == "last"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"secure-groups": 1}, "sees one sum cannot compare clients; set secure-groups = 5 or"),
        ({"secure-groups": 4}, "at least 5 groups, and secure-groups = 4"),
        ({"robust": "", "byzantine": 0}, "set robust and byzantine"),
        ({"secure": "ties"}, "set secure = mean"),
        ({"secure": "", "secure-roster": ""}, "secure-groups = 5 without secure"),
        ({"secure-merge": True}, "in a one-shot merge"),
        ({"fraction-train": 0.5}, "show single ones"),
        ({"robust": "momentum+median"}, "leave momentum out"),
        ({"secure-groups": 0}, "secure-groups"),
    ],
)
def test_groups_that_cannot_be_are_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        read_config({**SECURE, **words})
