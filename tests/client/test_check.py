"""What is refused before Flower starts, and that its remedy works."""

import json
import re

import pytest

from client import check
from client.config import DEFAULTS
from client.tasks import text_classification
from dare_agg.errors import ConfigError
from tests.chat import as_messages, make_model, talk

TALKS = [
    {"messages": [{"role": r, "content": f"{n}"} for r in ("user", "assistant")]} for n in range(4)
]


@pytest.fixture
def chat(tmp_path):
    """A model's folder, as far as it is looked at, with a chat template."""
    folder = tmp_path / "chat"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return folder


def talks(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def refusal(**words):
    with pytest.raises(ConfigError) as caught:
        check.check({name.replace("_", "-"): value for name, value in words.items()})
    return str(caught.value)


def test_a_missing_column_is_told_by_the_word_that_names_it(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("review,stars,by\n" + "great film,good,a\nbad film,bad,b\n" * 5)
    words = {"data": str(path)}
    for key, column in (("text-column", "review"), ("label-column", "stars")):
        said = refusal(**words)
        assert f"no column {DEFAULTS[key]!r}" in said and f"name it: {key}={column}" in said
        words[key] = column
    check.check(words)
    assert "did you mean 'stars'? Name it: label-column=stars" in refusal(
        **words | {"label-column": "star"}
    )
    assert refusal(**words, partition_by="nobody").endswith("known: by, review, stars")


def test_columns_of_questions_and_answers_are_offered_and_taken_as_such(tmp_path, chat):
    path = tmp_path / "alpaca.csv"
    path.write_text("instruction,input,output\n" + "1+1?,,2\n" * 5)
    words = {"data": str(path), "model": str(chat)}
    offered = dict(re.findall(r"(\w+-column)=(\w+)", refusal(**words).split("as questions")[1]))
    assert offered == {"prompt-column": "instruction", "answer-column": "output"}
    check.check({**words, **offered})
    slip = refusal(**words, prompt_column="instruction", answer_column="outputt")
    assert slip.endswith("no column 'outputt'; did you mean 'output'?")
    both = refusal(**words, prompt_column="foo", answer_column="bar")
    assert both.endswith("name prompt-column=instruction and answer-column=output")


def test_a_text_column_beside_named_questions_stays_text(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "great film,good\nbad film,bad\n" * 5)
    check.check({"data": str(path), "prompt-column": "nobody"})


def test_conversations_without_an_answer_are_refused(tmp_path, chat):
    silent = [{"messages": [*row["messages"][:1], {"role": "assistant", "content": ""}]}
              for row in TALKS]  # fmt: skip
    check.check({"data": talks(tmp_path / "a.jsonl", [*TALKS, *silent]), "model": str(chat)})
    said = refusal(data=talks(tmp_path / "b.jsonl", silent), model=str(chat))
    assert "no row to learn from: of 4 rows 4 an empty answer (first: line 1)" in said


def test_a_folder_without_a_chat_template_is_refused(tmp_path, chat):
    data = talks(tmp_path / "a.jsonl", TALKS)
    (chat / "tokenizer_config.json").write_text("{}")
    assert "has no chat template" in refusal(data=data, model=str(chat))
    (chat / "chat_template.jinja").write_text("{{ messages }}")
    check.check({"data": data, "model": str(chat)})


def test_conversations_that_do_not_fit_are_refused_and_the_length_said_is_enough(tmp_path):
    folder = str(make_model(tmp_path / "model"))
    data = talks(tmp_path / "a.jsonl", [{"messages": as_messages(talk(n))} for n in range(8)])
    words = {"data": data, "model": folder, "length": 8}
    said = refusal(**words)
    assert "the question alone fills length 8" in said
    (enough,) = re.findall(r"set length = (\d+), which keeps all", said)
    check.check({**words, "length": int(enough)})
    assert "context of model" in refusal(**words | {"length": 4096})
    rows = [{"messages": as_messages((("user", "hi"), ("assistant", "none")))}] * 9
    words = {**words, "length": int(enough), "data": talks(tmp_path / "b.jsonl", rows)}
    wordy = refusal(**words, generate_rows=2, answer_form="number")
    assert "answer-form = number, and the answer 'none'" in wordy


def test_large_and_packed_files_are_left_to_the_clients(tmp_path, monkeypatch):
    def load(config):
        raise AssertionError("was read")

    monkeypatch.setattr(text_classification, "load_labelled_text", load)
    path = tmp_path / "large.csv"
    with path.open("wb") as file:
        file.truncate((4 << 20) + 1)
    check.check({"data": str(path)})
    packed = tmp_path / "packed.csv.gz"
    packed.write_bytes(b"\x1f\x8b")
    check.check({"data": str(packed)})
