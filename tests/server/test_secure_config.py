"""Unsafe secure run configs fail before any node is asked."""

from __future__ import annotations

from typing import Any

import pytest

from dare_agg.errors import ConfigError
from dare_agg.secure.settings import SecureSettings
from server.reading import read_config

NOISED = {"weighting": "equal", "evaluate": False, "drop-rate": "0.9"}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"secure": "tie"}, "did you mean 'ties'"),
        ({"secure": "", "secure-merge": True}, "secure-merge without secure"),
        ({"methods": "fedavg"}, "secure names the method"),
        ({"mask": "bernoulli"}, "stratified is summed"),
        ({"keep-rates": "own"}, "the same elements of all: set last"),
        ({"keep-rates": "last", "secure-merge": True}, "has no round before"),
        ({"secure": "mean", "keep-rates": "last", "dp": "clients", **NOISED}, "would follow that"),
        ({"downlink": "auto", "secure-merge": True}, "downlink"),
        ({"upload-budget": "10 kB"}, "one mask"),
        ({"secure-roster": ""}, "secure-roster"),
        ({"secure-min-parties": 2}, "at least 3"),
        ({"secure-bits": 4}, "8 to 24"),
        ({"secure-bits": 16, "secure-min-parties": 300}, "14 or fewer"),
        ({"secure-threshold": 2}, "more than half"),
        ({"secure-clip": 0.0}, "secure-clip"),
        ({"trim": 0.2}, "magnitude trim"),
        ({"density": 0.2}, "magnitude trim"),
    ],
)
def test_unsafe_configs_are_refused(words: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read_config({"secure": "ties", "secure-roster": "roster.json", **words})


def test_safe_ones_are_not() -> None:
    config = read_config({"secure": "ties", "secure-roster": "r", "drop-rate": "0.5"})
    settings = config.secure_settings()
    assert (settings.method, settings.weighting, settings.bits_for(5)) == ("ties", "equal", 16)
    mean = read_config({"secure": "mean", "secure-roster": "r"}).secure_settings()
    assert mean.weighting == "examples" and mean.keep_rates == "uniform"
    words = {"secure": "mean", "secure-roster": "r", "keep-rates": "last"}
    assert read_config(words).secure_settings().keep_rates == "last"


def test_auto_is_a_number_here_since_no_norms_are_seen() -> None:
    config = read_config({"secure": "ties", "secure-roster": "r"})
    assert config.drop_rate == "0.9" and config.secure_settings().drop_rate.p == 0.9
    with pytest.raises(ConfigError, match="never sees; give a number"):
        SecureSettings("ties", drop_rate="auto")
