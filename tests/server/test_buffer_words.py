"""The run config's words of a buffer: what is refused before anything starts, and what is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from dare_agg.errors import ConfigError, StateError
from dare_agg.rounds.buffer import BufferSettings
from server.app import make_strategy
from server.buffer_words import buffer_settings
from server.reading import read_config

FIVE = {"buffer": 5, "min-clients": 10}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"buffer": 5}, r"buffer = 5 with 2 clients: .*set min-clients to 5 or more \(--clients"),
        ({**FIVE, "staleness": "sqr"}, "did you mean 'sqrt'"),
        ({**FIVE, "staleness": "linear(over=5)"}, "5 merges old nothing"),
        ({**FIVE, "dp": "clients", "dp-members": 10, "weighting": "equal",
          "drop-rate": "0.9"},
         "with dp = clients: .*set dp = records"),
        ({**FIVE, "train": "lora", "lora-merge": "product"}, "set lora-merge = factors"),
        ({**FIVE, "methods": "dare-task-arithmetic,dare-fisher"}, "fisher statistics"),
        ({**FIVE, "methods": "dare-wudi"}, "directions"),
        ({**FIVE, "keep-rates": "last"}, "told anew"),
        ({**FIVE, "min-replies": 6}, "lower min-replies"),
        ({**FIVE, "robust": "nnm+trimmed-mean", "byzantine": 1, "drop-rate": "0.9"},
         "set drop_rate 0"),
        ({**FIVE, "robust": "nnm+trimmed-mean", "byzantine": 2, "drop-rate": "0", "buffer": 3},
         "raise buffer"),
        ({**FIVE, "secure": "mean", "secure-roster": "r.json"}, "with secure: a sum needs all"),
        ({**FIVE, "methods": "fedavg,dare-ties", "arrivals": "a"}, "arrivals with 2 rows"),
        ({"staleness": "constant"}, "staleness = 'constant' without buffer"),
        ({"max-staleness": 3}, "max-staleness = 3 without buffer"),
        ({"arrivals": "a"}, "arrivals = 'a' without buffer"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused_before_the_run(words, said):
    with pytest.raises(ConfigError, match=said):
        read_config(words)


def test_a_record_that_is_none_is_refused_before_the_run(tmp_path):
    with pytest.raises(StateError, match="cannot be read"):
        read_config({**FIVE, "arrivals": str(tmp_path / "none")})


def test_what_a_buffer_is_made_of(tmp_path: Path):
    config = read_config({**FIVE, "staleness": "hinge", "max-staleness": 7})
    found = buffer_settings(config, tmp_path)
    assert found == BufferSettings(5, "hinge", 7, record=tmp_path / "buffer")
    strategy = make_strategy(config, "dare-task-arithmetic", lambda outcome: None, tmp_path)
    assert strategy.buffered is not None and strategy.buffered.settings == found
    assert buffer_settings(read_config({}), tmp_path) == 0
    kept = buffer_settings(read_config({**FIVE, "keep-state": False}), tmp_path)
    assert isinstance(kept, BufferSettings) and not kept.record


@pytest.mark.parametrize(
    "words",
    [
        {"robust": "norm-bound", "byzantine": 1},
        {"robust": "nnm+trimmed-mean", "byzantine": 2, "drop-rate": "0"},
        {"robust": "nnm+trimmed-mean", "byzantine": 2},
        {"dp": "records"},
        {"train": "lora"},
        {"methods": "fedavg,dare-ties,head-only"},
        {"drop-rate": "0.9,0.99"},
    ],
    ids=str,
)
def test_what_is_borne(words):
    assert read_config({**FIVE, **words}).buffer == 5
