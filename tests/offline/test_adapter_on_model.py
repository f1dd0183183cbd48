"""MODEL+ADAPTER: an adapter on a model of its own, as one model over another base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dare_agg.offline.model_words import model_words
from tests.offline.test_adapters import FORMS, adapted, change
from tests.tiny import command, llama, rewrite, tensors, worst


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "instruct", "code")):
        llama(folder / name, seed)
    return folder


def merged(capsys: Any, folder: Path, *words: object) -> dict[str, Any]:
    status, said = command(capsys, "merge", *words, "-o", folder / "out")
    assert status == 0, said
    return tensors(folder / "out")


@pytest.mark.parametrize("form", ["plain", "dora", "pissa", "tokens", "whole head"])
def test_it_is_the_model_that_peft_makes_of_the_two(
    files: Path, tmp_path: Path, capsys: Any, form: str
) -> None:
    right = adapted(files / "instruct", tmp_path / "a", FORMS[form])
    base, code = tensors(files / "base"), tensors(files / "code")
    word = f"{files / 'instruct'}+{tmp_path / 'a'}"
    alone = merged(capsys, tmp_path / "1", files / "base", word)
    assert worst(alone, right) < 1e-6
    ours = merged(capsys, tmp_path / "2", files / "base", word, files / "code", "--weights", "1,.5")
    both = {name: right[name] + 0.5 * (code[name] - base[name]) for name in base}
    assert worst(ours, both) < 1e-6


def test_names_may_be_those_of_a_wrapped_model(files: Path, tmp_path: Path, capsys: Any) -> None:
    right = adapted(files / "instruct", tmp_path / "a", {})
    own = llama(tmp_path / "own", 1)
    rewrite(own, lambda t: {f"_orig_mod.{name}": value for name, value in t.items()})
    assert worst(merged(capsys, tmp_path, files / "base", f"{own}+{tmp_path / 'a'}"), right) < 1e-6


def test_recipes_diff_and_diagnose_take_it_too(files: Path, tmp_path: Path, capsys: Any) -> None:
    right = adapted(files / "instruct", tmp_path / "a", {})
    word = f"{files / 'instruct'}+{tmp_path / 'a'}"
    for number, model in enumerate(
        (word, {"path": word}, {"path": str(files / "instruct"), "adapter": "a"})
    ):
        recipe = tmp_path / "recipe.json"
        values = {"base": str(files / "base"), "models": [model], "method": "linear"}
        recipe.write_text(json.dumps(values))
        ours = merged(capsys, tmp_path / str(number), "--recipe", recipe)
        assert worst(ours, right) < 1e-6
    card = (tmp_path / "0" / "out" / "README.md").read_text()
    assert "| instruct + a | checkpoint with adapter |" in card
    words = ("diff", files / "base", word, "-o", tmp_path / "u.dare", "--drop-rate", "0")
    assert command(capsys, *words, "--values", "f32")[0] == 0
    ours = merged(capsys, tmp_path / "update", files / "base", tmp_path / "u.dare")
    assert worst(ours, right) < 1e-6
    status, said = command(capsys, "diagnose", files / "base", word, "--json")
    assert status == 0 and json.loads(said)["models"][0]["norm"] > 0


def test_a_path_that_exists_is_meant_as_such(files: Path, tmp_path: Path, capsys: Any) -> None:
    plain = llama(tmp_path / "a+b", 1)
    assert model_words(plain) == {"path": str(plain)}
    right = adapted(files / "instruct", tmp_path / "more+one", {})
    word = f"{plain}+{tmp_path / 'more+one'}"
    assert worst(merged(capsys, tmp_path, files / "base", word), right) < 1e-6
    assert model_words("org/m+org2/lora") == {"path": "org/m", "adapter": "org2/lora"}
    assert model_words("org/m@v1+cu") == {"path": "org/m@v1+cu"}


def refused(capsys: Any, *words: object) -> str:
    status, said = command(capsys, *words)
    assert status == 1 and said.count("\n") == 1, said
    return said


def test_what_cannot_be_is_said(files: Path, tmp_path: Path, capsys: Any) -> None:
    base, out = files / "base", ("-o", tmp_path / "out")
    adapted(base, tmp_path / "a", {})
    said = refused(capsys, "merge", f"{base}+{tmp_path / 'a'}", files / "code", *out)
    assert "make a model of the two first" in said
    assert (
        command(capsys, *said[said.index("dare-agg merge") :].split()[1:-1], tmp_path / "m")[0] == 0
    )
    said = refused(capsys, "merge", base, f"{files / 'code'}+{tmp_path / 'none'}", *out)
    assert "none does not exist" in said
    said = refused(capsys, "merge", base, f"{tmp_path / 'a'}+{tmp_path / 'a'}", *out)
    assert "is no whole model" in said
    said = refused(capsys, "merge", base, f"{base}+{files / 'code'}", *out)
    assert "adapter_config.json" in said
    other = llama(tmp_path / "other", hidden_size=48)
    adapted(other, tmp_path / "b", {})
    said = refused(capsys, "merge", base, f"{base}+{tmp_path / 'b'}", *out)
    assert "the adapter belongs to another model" in said
    change(tmp_path / "a", peft_type="LOHA")
    said = refused(capsys, "merge", base, f"{files / 'code'}+{tmp_path / 'a'}", *out)
    assert f"{files / 'code'} {tmp_path / 'a'}" in said
