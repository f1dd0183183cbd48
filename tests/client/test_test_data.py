"""Test rows in a file of their own: ``test-data``."""

from __future__ import annotations

import json

import pytest

from client.check import check
from client.config import configure, task_config
from client.data import load_text
from client.instructions.sources import load_conversations
from client.own import own_words
from client.tasks.image_classification import TASK as IMAGES
from client.tasks.task import test_share as share_of
from dare_agg.errors import ConfigError
from tests.chat import as_messages, talk


@pytest.fixture
def files(tmp_path):
    """A file to train on, with a group, and one to test on, without."""
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("text;label;by\n" + "".join(f"row {i};{'ab'[i % 2]};x\n" for i in range(40)))
    test.write_text("text;label\nfirst;a\nsecond;b\nthird;a\n")
    return train, test


def test_all_rows_are_trained_on_and_the_other_files_tested(files):
    train, test = files
    data = load_text(str(train), test_source=str(test), partition_by="by", delimiter=";")
    assert len(data.train) == 40 and set(data.test.inputs) == {"first", "second", "third"}
    assert data.label_names == ("a", "b") and set(data.train.groups) == {"x"}


def test_a_built_in_set_may_be_tested_on_a_file(files, tmp_path):
    rows = tmp_path / "own.jsonl"
    rows.write_text(json.dumps({"text": "free prize", "label": "spam"}) + "\n")
    data = load_text("sms", test_source=str(rows))
    assert data.test.inputs == ("free prize",) and len(data.train) > 4000


def test_conversations(tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    for path, numbers in ((train, range(6)), (test, range(6, 8))):
        path.write_text("\n".join(json.dumps({"messages": as_messages(talk(n))}) for n in numbers))
    config = configure(data=str(train), test_data=str(test), model="smollm2")
    (train_rows, test_rows), _ = load_conversations(config)
    assert len(train_rows) == 6 and len(test_rows) == 2


def test_what_cannot_be(files):
    train, test = files
    with pytest.raises(ConfigError, match="leave the other out"):
        share_of(configure(data=str(train), test_data=str(test), held_out=0.1))
    with pytest.raises(ConfigError, match="put them into photos/test"):
        IMAGES.load(configure(data="photos", test_data="other"))
    with pytest.raises(ConfigError, match=r"test-data 'none[.]csv' does not exist"):
        check({"data": str(train), "delimiter": ";", "test-data": "none.csv"})


def test_a_node_names_its_own_and_a_guarded_one_no_other():
    run = {"data": "sms", "test-data": "run.csv"}
    assert task_config(run, {"test-data": "own.csv"}).test_data == "own.csv"
    assert own_words(run, {})["test-data"] == ""
    assert own_words(run, {"test-data": "own.csv"})["test-data"] == "own.csv"
