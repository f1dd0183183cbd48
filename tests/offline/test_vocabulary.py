"""Models whose tokens are not BASE's: rows aligned by token, as mergekit's tokenizer_source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import command, llama, tensors
from tests.tokenizers import tokenizer

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Six words; "<a>" and "<b>" are added by one model, "<b>" and "<c>" by another, in other places.
ROWS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vocabularies")
    made = {"base": tokenizer(llama(root / "base", vocab_size=ROWS))}
    made["a"] = tokenizer(llama(root / "a", 1, vocab_size=ROWS + 2), added=("<a>", "<b>"))
    made["b"] = tokenizer(llama(root / "b", 2, vocab_size=ROWS + 2), added=("<b>", "<c>"))
    return made


def merged(capsys: Any, out: Path, *words: object) -> tuple[dict[str, Any], str]:
    status, said = command(capsys, "merge", *words, "-m", "average", "-o", out)
    assert status == 0, said
    assert [p.name for p in out.parent.glob(".*")] == []
    return tensors(out), said


def ids(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).get_vocab()


def test_base_keeps_its_tokens_and_says_which_others_are_left(
    folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    base, a = folders["base"], folders["a"]
    out, said = merged(capsys, tmp_path / "out", base, a, "--vocabulary", "base")
    assert f"{a} has 2 tokens that OUT does not get ('<a>', '<b>')" in said
    right = tensors(a)
    for name in (EMBED, HEAD):
        np.testing.assert_allclose(out[name], right[name][:ROWS], atol=1e-7)
    assert ids(tmp_path / "out") == ids(base)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == ROWS


def test_union_has_each_token_of_all_by_mergekits_rule(
    folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, a, b = (folders[name] for name in ("base", "a", "b"))
    place = tmp_path / "out"
    out, _ = merged(capsys, place, base, a, b, "--vocabulary", "union")
    found = ids(place)
    assert found == {**ids(base), "<a>": 6, "<b>": 7, "<c>": 8}
    known = {name: (ids(folders[name]), tensors(folders[name])) for name in ("base", "a", "b")}
    for name in (EMBED, HEAD):
        assert out[name].shape[0] == 9
        for token, at in found.items():
            rows = {k: t[name][i[token]] for k, (i, t) in known.items() if token in i}
            mean = np.mean([rows[k] for k in rows if k != "base"], axis=0)
            np.testing.assert_allclose(out[name][at], mean, atol=1e-7, err_msg=token)
    for file in ("tokenizer.json",):
        assert '"<c>"' in (place / file).read_text()
    tokens = AutoTokenizer.from_pretrained(place)
    assert tokens("a <b> b").input_ids == [3, 7, 4]
    assert tokens.convert_tokens_to_ids("<c>") == 8 and tokens.eos_token == "</s>"
    model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    assert model.config.vocab_size == 9 and not any(info.values()), info


def test_a_token_that_one_model_lacks_stays_the_bases(
    folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    base, a = folders["a"], folders["base"]
    out, _ = merged(capsys, tmp_path / "out", base, a, "--vocabulary", "base")
    theirs, own = tensors(a), tensors(base)
    np.testing.assert_allclose(out[EMBED][:ROWS], theirs[EMBED], atol=1e-7)
    np.testing.assert_array_equal(out[EMBED][ROWS:], own[EMBED][ROWS:])


def test_rows_go_by_token_where_ids_differ_and_padding_stays(
    folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    base = tokenizer(llama(tmp_path / "base", vocab_size=16), added=("<x>", "<b>"))
    b = folders["b"]
    out, _ = merged(capsys, tmp_path / "out", base, b, "--vocabulary", "union")
    assert out[EMBED].shape[0] == 16
    found = ids(tmp_path / "out")
    assert (found["<x>"], found["<b>"], found["<c>"]) == (6, 7, 8)
    theirs, own = tensors(b)[EMBED], tensors(base)[EMBED]
    np.testing.assert_allclose(out[EMBED][[0, 7, 8]], theirs[[0, 6, 7]], atol=1e-7)
    np.testing.assert_array_equal(out[EMBED][6], own[6])
    np.testing.assert_array_equal(out[EMBED][9:], own[9:])


def test_a_models_tokenizer_decides_the_rows(
    folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    from transformers import AutoModelForCausalLM

    base, b = folders["base"], folders["b"]
    words = ("--vocabulary", "base", "--tokenizer", b)
    out, _ = merged(capsys, tmp_path / "out", base, folders["a"], b, *words)
    assert ids(tmp_path / "out") == ids(b)
    a, own = tensors(folders["a"])[EMBED], tensors(b)[EMBED]
    np.testing.assert_allclose(out[EMBED][0], (a[0] + own[0]) / 2, atol=1e-7)
    np.testing.assert_allclose(out[EMBED][6], (a[7] + own[6]) / 2, atol=1e-7)
    # Base and a lack "<c>": both take over the one row that there is.
    np.testing.assert_allclose(out[EMBED][7], own[7], atol=1e-7)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 8


def test_tied_and_half_precision_models_align_too(tmp_path: Path, capsys: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = tokenizer(llama(tmp_path / "base", vocab_size=ROWS, tie_word_embeddings=True))
    a = tokenizer(
        llama(tmp_path / "a", 1, vocab_size=8, tie_word_embeddings=True), added=("<a>", "<b>")
    )
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    out, _ = merged(capsys, tmp_path / "out", base, a, "--vocabulary", "union")
    assert HEAD not in out
    right = torch.tensor(tensors(a)[EMBED]).bfloat16().float().numpy()
    np.testing.assert_array_equal(out[EMBED], right)


def test_vocabularies_that_differ_are_refused_with_a_way_that_works(
    folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    base, a = folders["base"], folders["a"]
    status, said = command(capsys, "merge", base, a, "-o", tmp_path / "out")
    assert status == 1 and "a vocabulary of 8 rows, BASE has 6" in said
    assert "--vocabulary union" in said and "--exclude" in said
    bare = shutil.copytree(a, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    status, said = command(capsys, "merge", base, bare, "-o", tmp_path / "out")
    assert status == 1 and "--vocabulary" not in said
    words = ("merge", base, bare, "--vocabulary", "union", "-o", tmp_path / "out")
    status, said = command(capsys, *words)
    assert status == 1 and "no tokenizer.json" in said and said.count("\n") == 1
    words = ("merge", base, a, "--vocabulary", "union", "-o", tmp_path / "out.safetensors")
    status, said = command(capsys, *words)
    assert status == 1 and "name a folder" in said
    (bare / "tokenizer.json").write_text('{"model": {"vocab": {"a": -1}}}')
    status, said = command(capsys, *words[:2], bare, *words[3:5], "-o", tmp_path / "out")
    assert status == 1 and "token 'a' has id -1" in said
