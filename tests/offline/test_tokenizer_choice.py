"""Whose tokenizer OUT has, and what is said where models have another than BASE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dare_agg.checkpoint.tokenizer import differences, read_tokenizer
from tests.tiny import command, llama
from tests.tokenizers import tokenizer

PLAIN, CHAT = "{{ messages[0]['content'] }}", "<|im_start|>{{ messages[0]['content'] }}<|im_end|>"
ADDED = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base without a chat template, and a model tuned for chat: template, end, two tokens."""
    root = tmp_path_factory.mktemp("chat")
    base = tokenizer(llama(root / "base"))
    tuned = tokenizer(llama(root / "tuned", 1), end="<|im_end|>", added=ADDED, template=CHAT)
    for file, ids in (("config.json", 7), ("generation_config.json", [7, 2])):
        values = json.loads((tuned / file).read_text()) | {"eos_token_id": ids, "pad_token_id": 6}
        (tuned / file).write_text(json.dumps(values))
    return base, tuned


def test_a_model_that_speaks_otherwise_is_warned_of(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    base, tuned = pair
    status, said = command(capsys, "merge", base, tuned, "-o", tmp_path / "o")
    assert status == 0 and f"{tuned} differs from BASE in its chat template (BASE has none)" in said
    assert "end token ('<|im_end|>', BASE '</s>') and 2 added tokens" in said
    assert f"--tokenizer {tuned} takes its own" in said
    assert AutoTokenizer.from_pretrained(tmp_path / "o").eos_token == "</s>"
    # No difference, or a choice: no warning.
    for words in ((base, base), (base, tuned, "--tokenizer", "base")):
        status, said = command(capsys, "merge", *words, "-o", tmp_path / "p", "--force")
        assert status == 0 and "tokenizer" not in said


def test_the_chosen_models_tokenizer_template_and_end_tokens_are_outs(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tuned = pair
    update, recipe = tmp_path / "u.dare", tmp_path / "r.json"
    assert command(capsys, "diff", base, tuned, "-o", update)[0] == 0
    recipe.write_text(
        json.dumps(
            {"base": str(base), "models": [str(tuned)], "method": "ties", "tokenizer": str(tuned)}
        )
    )
    for words in (
        ("merge", base, tuned, "--tokenizer", tuned),
        ("merge", "--recipe", recipe),
        ("apply", base, update, "--tokenizer", tuned),
    ):
        out = tmp_path / "o"
        status, said = command(capsys, *words, "-o", out, "--force")
        assert status == 0 and "differs" not in said, said
        ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tuned)
        talk = [{"role": "user", "content": "a b"}]
        assert ours.apply_chat_template(talk, tokenize=False) == "<|im_start|>a b<|im_end|>"
        assert ours("a <|im_end|>")["input_ids"] == theirs("a <|im_end|>")["input_ids"] == [3, 7]
        assert ours.eos_token == "<|im_end|>" and ours.eos_token_id == 7
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.config.eos_token_id == 7 and model.config.pad_token_id == 6
        assert (
            model.config.bos_token_id
            == AutoModelForCausalLM.from_pretrained(base).config.bos_token_id
        )
        assert model.generation_config.eos_token_id == [7, 2]


def test_base_keeps_nothing_of_its_own_tokenizer(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = (shutil.copytree(path, tmp_path / path.name) for path in pair)
    for file in ("vocab.json", "special_tokens_map.json", "LICENSE"):
        (base / file).write_text("{}")
    (tuned / "additional_chat_templates").mkdir()
    (tuned / "additional_chat_templates/tools.jinja").write_text(PLAIN)
    out = tmp_path / "o"
    assert command(capsys, "merge", base, tuned, "-o", out, "--tokenizer", tuned)[0] == 0
    assert (out / "LICENSE").exists() and not (out / "vocab.json").exists()
    assert not (out / "special_tokens_map.json").exists()
    assert (out / "additional_chat_templates/tools.jinja").read_text() == PLAIN
    # A base that is one file has no tokenizer to keep.
    words = ("merge", base / "model.safetensors", tuned, "-o", tmp_path / "p")
    assert command(capsys, *words, "--tokenizer", tuned)[0] == 0
    assert (tmp_path / "p/tokenizer.json").exists()


def test_a_choice_that_cannot_be_had_is_refused_before_any_work(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = pair
    bare = llama(tmp_path / "bare")
    larger = tokenizer(tmp_path / "larger", added=[f"<{n}>" for n in range(60)])
    merge = ("merge", base, tuned)
    for words, word in (
        ((*merge, "-o", tmp_path / "o", "--tokenizer", bare), "has no tokenizer; give base"),
        ((*merge, "-o", tmp_path / "o.safetensors", "--tokenizer", tuned), "is a file"),
        ((*merge, "-o", tmp_path / "o", "--tokenizer", tmp_path / "none"), "none does not exist"),
        (
            (*merge, "-o", tmp_path / "o", "--tokenizer", larger),
            "has token '<59>' at 65, OUT has 64 rows",
        ),
    ):
        status, said = command(capsys, *words)
        assert status == 1 and word in said and said.count("\n") == 1, said
        assert not list(tmp_path.glob("o*"))
    status, said = command(capsys, "merge", bare, tuned, "-o", tmp_path / "o")
    assert status == 0 and "has a tokenizer, BASE has none: OUT gets none" in said


SETTINGS = "tokenizer_config.json"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (SETTINGS, {"eos_token": {"content": "</t>"}}, "end token ('</t>', BASE '</s>')"),
        ("special_tokens_map.json", {"eos_token": "</t>"}, "end token ('</t>', BASE '</s>')"),
        ("special_tokens_map.json", {"eos_token": "</s>"}, ""),
        (SETTINGS, {"chat_template": PLAIN}, "chat template"),
        (SETTINGS, {"chat_template": CHAT}, ""),
        (SETTINGS, {"chat_template": [{"name": "default", "template": CHAT}]}, ""),
        (SETTINGS, {"chat_template": [{"name": "tools", "template": CHAT}]}, "chat template"),
        ("chat_template.json", {"chat_template": PLAIN}, "chat template"),
        ("chat_template.jinja", CHAT + "x", "chat template"),
        ("chat_template.jinja", CHAT + "\n", ""),
        (SETTINGS, {"added_tokens_decoder": {"9": {"content": "<t>"}}}, "1 added tokens ('<t>')"),
        ("added_tokens.json", {"<x>": 8}, "the id of '<x>'"),
        ("tokenizer.json", {"added_tokens": [{"id": 9, "content": "["}], "model": {}},
         "1 added tokens ('[')"),
        # Of a vocabulary that is larger than what is read.
        ("tokenizer.json", '{"added_tokens": [{"id": 9, "content": "\\""}], "model": ',
         "1 added tokens ('\"')"),
        ("generation_config.json", {"eos_token_id": [2, 9]}, "end token's ids (2, 9, BASE 2)"),
        ("config.json", {"text_config": {"eos_token_id": 9}}, "end token's ids (9, BASE 2)"),
        (SETTINGS, {"eos_token": 7, "chat_template": 7, "added_tokens_decoder": []}, ""),
        (SETTINGS, "no JSON", ""),
    ],
)  # fmt: skip
def test_what_differs_is_read_from_every_file_that_says_it(
    file: str, content: Any, said: str, tmp_path: Path
) -> None:
    base, model = tmp_path / "base", tmp_path / "model"
    texts = {
        base / SETTINGS: {
            "eos_token": "</s>", "chat_template": CHAT,
            "added_tokens_decoder": {"7": {"content": "<x>"}},
        },
        base / "config.json": {"eos_token_id": 2},
        model / file: content,
    }  # fmt: skip
    for path, value in texts.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    found = differences(read_tokenizer(base), read_tokenizer(model))
    assert found == ([said] if said else [])
