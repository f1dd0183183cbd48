import inspect
import json
from dataclasses import MISSING, fields

import pytest

from client.config import TaskConfig
from dare_agg.errors import DareError
from dare_agg.flower import DareStrategy
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import server_step
from dare_agg.rounds.terms import UpdateTerms
from server.compared import METHODS
from server.config import DEFAULTS, RunConfig
from server.reading import read_config
from server.resumed import check_resumed

# Whose default differs on purpose: in the run config lists and "none" are text or 0, the app's
# own models have a head, and its "steps" are the optimizer's.
OWN_DEFAULTS = {
    "dense", "exclude", "seed", "deadline", "upload_budget", "identities", "downlink", "steps",
    "max_empty_rounds", "base",
}  # fmt: skip


def test_every_key_is_checked_and_has_its_default_in_the_apps_pyproject_alone():
    keys = {key.replace("-", "_") for key in DEFAULTS}
    assert keys == set(RunConfig.model_fields)
    assert all(row.is_required() for row in RunConfig.model_fields.values())
    of_task = {field.name: field.default for field in fields(TaskConfig)}
    assert of_task.pop("lora_own_rank") == 0  # a node's own word
    assert of_task.keys() <= keys and set(of_task.values()) == {MISSING}


def test_the_apps_defaults_are_the_librarys():
    usual = read_config({})
    words = inspect.signature(DareStrategy).parameters
    shared = (set(words) & set(RunConfig.model_fields)) - OWN_DEFAULTS
    assert {"drop_rate", "values", "scaling", "server_step", "weighting"} < shared
    for name in sorted(shared):
        assert getattr(usual, name) == words[name].default, name
    (method,) = (METHODS[name].words["method"] for name in usual.methods)
    assert method == words["method"].default


def test_the_librarys_defaults_are_its_classes():
    made = DareStrategy()
    assert made.settings == FederatedSettings() and made.settings.terms == UpdateTerms()


def test_a_number_may_be_typed_as_one():
    config = read_config({"drop-rate": 0.995, "upload-budget": 300_000})
    assert (config.drop_rate, config.upload_budget) == ("0.995", "300000")


def test_every_number_of_a_server_step_can_be_set():
    config = read_config({"server-step": "adam(tau=0.1)", "server-learning-rate": 0.5})
    assert config.step() == server_step("adam", lr=0.5, tau=0.1)
    assert read_config({}).step() == server_step("plain")


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
        ({"directions": 4}, "no method merges by directions"),
        ({"direction-bits": 3, "methods": "dare-wudi"}, "direction-bits"),
        ({"methods": "dare-wudi", "train": "lora"}, "factors of adapters"),
        ({"weight-bound": 0.5}, "weight_bound = 0.5; at least 1 is needed"),
        ({"learning-rate": "fast"}, "learning-rate = 'fast'"),
        ({"verify-every": 2}, "verify-every = 2 without base"),
        ({"base": "org/model", "initial": "a.safetensors"}, "base and initial both say"),
        ({"base": "org/model", "train": "lora"}, "set train = full"),
        ({"base": "org/model", "methods": "fedavg,head-only"}, "set train = full"),
    ],
)
def test_a_bad_key_fails_before_anyone_trains(bad, message):
    with pytest.raises(DareError, match=message):
        read_config({**bad})


def test_adapters_are_sent_whole_in_one_bit_unless_a_rate_is_said():
    def terms(**raw):
        config = read_config({"train": "lora", **raw})
        return config.drop_rate, config.values

    assert terms() == ("0", "b1")
    assert terms(**{"drop-rate": "0.9"}) == ("0.9", "b1")
    assert terms(**{"drop-rate": 0.99}) == ("0.99", "b1")


ADAPTER_WORDS = {
    "lora-rank": 4, "lora-alpha": 3, "lora-targets": "q_proj", "lora-bias": "all",
    "lora-whole": "norm", "lora-rslora": True, "lora-dora": True, "lora-ranks": "2,4",
}  # fmt: skip


def test_words_of_adapters_are_refused_by_name_where_none_is_trained():
    assert {*ADAPTER_WORDS, "lora-merge"} == {key for key in DEFAULTS if key.startswith("lora-")}
    for key, word in ADAPTER_WORDS.items():
        for others in ({}, {"train": "head"}, {"methods": "head-only", "train": "lora"}):
            does = "head" if others else "full"
            with pytest.raises(DareError, match=f"^{key}, and train = {does} trains no adapters"):
                read_config({key: word, **others})
        read_config({key: word, "train": "lora"})
        read_config({key: word, "train": "lora", "methods": "fedavg,head-only"})
        read_config({key: DEFAULTS[key]})
    with pytest.raises(DareError, match=r"^lora-alpha, lora-rank, and.*or leave them out"):
        read_config({"lora-rank": 4, "lora-alpha": 3})


def test_rounds_choose_rate_and_format_where_neither_is_said():
    def terms(**raw):
        config = read_config(raw)
        return config.drop_rate, config.values

    assert terms() == ("auto", "auto")
    assert terms(values="i8") == ("auto", "i8")
    assert terms(**{"drop-rate": 0.9}) == ("0.9", "b1")
    assert terms(**{"drop-rate": "0.9", "values": "i8"}) == ("0.9", "i8")


def test_a_run_that_an_earlier_default_began_is_told_how_to_go_on(tmp_path):
    begun = {"status": "failed", "config": {"drop-rate": "0.9", "values": "b1"}}
    (tmp_path / "run.json").write_text(json.dumps(begun))
    words = {"output": str(tmp_path), "resume": True}
    with pytest.raises(DareError, match=r"drop-rate '0.9' → 'auto'.*set these as before to go on"):
        check_resumed(read_config(words), tmp_path)
    check_resumed(read_config({**words, "drop-rate": "0.9"}), tmp_path)
    with pytest.raises(DareError, match="leave this out to go on"):
        check_resumed(read_config({**words, "drop-rate": "0.9", "alpha": 9.0}), tmp_path)
