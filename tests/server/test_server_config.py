import tomllib
from pathlib import Path

import pytest

from dare_agg.errors import DareError
from server.config import RunConfig, read_config

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def defaults():
    return tomllib.loads(PROJECT.read_text())["tool"]["flwr"]["app"]["config"]


def test_the_apps_defaults_are_the_models_defaults():
    assert read_config(defaults()) == RunConfig()
    assert set(defaults()) == {name.replace("_", "-") for name in RunConfig.model_fields}


def test_a_number_may_be_typed_as_one():
    config = read_config({**defaults(), "drop-rate": 0.995, "upload-budget": 300_000})
    assert (config.drop_rate, config.upload_budget) == ("0.995", "300000")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num-round": 3}, "did you mean 'num-rounds'"),
        ({"num-rounds": 0}, "num-rounds = 0"),
        ({"drop-rate": "1.5"}, r"outside \[0, 1\)"),
        ({"methods": "fedvg"}, "did you mean 'fedavg'"),
        ({"methods": ""}, "methods is empty"),
        ({"values": "b3"}, "value format 'b3'"),
        ({"exclude": "("}, "not a regular expression"),
        ({"partition": "column"}, "needs partition-by"),
        ({"learning-rate": "fast"}, "learning-rate = 'fast'"),
    ],
)
def test_a_bad_key_fails_before_anyone_trains(bad, message):
    with pytest.raises(DareError, match=message):
        read_config({**defaults(), **bad})
