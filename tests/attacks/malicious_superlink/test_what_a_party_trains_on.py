"""The server's run config names a path, a column or a model for a guarded node to read."""

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import client.app
from client.config import DEFAULTS, task_config
from client.own import own_words
from dare_agg.errors import ConfigError

NODE = {"secure-identity": "north.key", "data-path": "/own/patients.csv", "base-path": "/own/base"}


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("data", "/etc/passwd"), ("data", "/own/payroll.csv"), ("model", "/own/my-model"),
        ("label-column", "name"), ("label-column", "text"), ("text-column", "diagnosis"),
        ("partition-by", "name"),
    ],
)  # fmt: skip
def test_the_runs_word_has_no_say(key, word):
    told = task_config(own_words({**DEFAULTS, key: word}, NODE), NODE)
    honest = task_config(own_words(DEFAULTS, NODE), NODE)
    assert told == honest
    assert (honest.data, honest.model) == ("/own/patients.csv", "/own/base")
    assert (honest.text_column, honest.label_column) == ("text", "label")


def test_the_nodes_own_columns_count():
    node = {**NODE, "label-column": "site", "text-column": "note"}
    config = task_config(own_words({**DEFAULTS, "label-column": "name"}, node), node)
    assert (config.text_column, config.label_column) == ("note", "site")


@pytest.mark.parametrize("key", ["data", "model"])
@pytest.mark.parametrize(
    "word", ["/srv/any", "relative/any", "hub/name", "../../etc", "", "reuters-r8,/etc/passwd"]
)
def test_without_a_word_of_its_own_only_public_names_count(key, word):
    node = {"secure-identity": "north.key"}
    public = own_words(DEFAULTS, node)
    assert (public["data"], public["model"]) == ("reuters-r8", "minilm")
    if word or key == "model":
        with pytest.raises(ConfigError, match="name its own in --node-config"):
            own_words({**DEFAULTS, key: word or "x"}, node)


def test_the_app_asks_for_its_own_words(monkeypatch):
    seen = []
    monkeypatch.setattr(client.app, "_task", seen.append)
    run = {**DEFAULTS, "data": "/own/payroll.csv", "label-column": "salary", "steps": 7}
    message = Message(RecordDict({"config": ConfigRecord({"train": "full"})}), 7, "train")
    for node in (NODE, {k: v for k, v in NODE.items() if k != "secure-identity"}):
        context = Context(run_id=1, node_id=7, node_config=node, state=RecordDict(), run_config=run)
        client.app._own_task(message, context)
    guarded, plain = seen
    assert (guarded.data, guarded.label_column, guarded.steps) == ("/own/patients.csv", "label", 7)
    assert plain.label_column == "salary"
