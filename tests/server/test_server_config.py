import tomllib
from pathlib import Path

import pytest

from dare_agg.errors import DareError
from dare_agg.rounds.step import server_step
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


def test_every_number_of_a_server_step_can_be_set():
    config = read_config(
        {**defaults(), "server-step": "adam(tau=0.1)", "server-learning-rate": 0.5}
    )
    assert config.step() == server_step("adam", lr=0.5, tau=0.1)
    assert read_config(defaults()).step() == server_step("plain")


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
        ({"server-step": "adma"}, "did you mean 'adam'"),
        ({"server-step": "adam(beta1=1)"}, r"beta1 = 1.0; it must lie in \[0, 1\)"),
        ({"server-step": "plain(lr=1)", "server-learning-rate": 0.5}, "lr is given again"),
        ({"learning-rate": "fast"}, "learning-rate = 'fast'"),
    ],
)
def test_a_bad_key_fails_before_anyone_trains(bad, message):
    with pytest.raises(DareError, match=message):
        read_config({**defaults(), **bad})
