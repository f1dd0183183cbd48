"""Checkpoints whose names, copies or sizes are not BASE's: merged right, or told in one line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import command, llama, rewrite, tensors, worst

SOLO = ("-m", "task-arithmetic")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("names") / "base")


def merged(capsys: Any, out: Path, *words: object) -> tuple[dict[str, Any], str]:
    status, said = command(capsys, "merge", *words, "-o", out)
    assert status == 0, said
    return tensors(out), said


def refused(capsys: Any, out: Path, *words: object) -> str:
    status, said = command(capsys, "merge", *words, "-o", out)
    assert status == 1 and said.count("\n") == 1, said
    assert not out.exists()
    return said


def offered(said: str) -> list[str]:
    """What an error offers to type, as the shell reads it."""
    import shlex

    return shlex.split(said[said.index("--exclude") :].strip())


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """GPT-2 as its first files are (no prefix, masks stored), and a model tuned from it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    model.transformer.save_pretrained(folder / "base")
    mask = torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16)
    rewrite(
        folder / "base",
        lambda t: t | {f"h.{i}.attn.bias": mask for i in range(2)}
        | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)},
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def test_masks_that_a_model_lacks_stay_the_bases(
    gpt2: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    base, tuned = gpt2
    out, _ = merged(capsys, tmp_path / "out", base, tuned)
    theirs = {n.removeprefix("transformer."): v for n, v in tensors(tuned).items()}
    theirs.pop("lm_head.weight", None)
    assert worst(out, theirs) < 1e-6
    assert (out["h.1.attn.bias"] == tensors(base)["h.1.attn.bias"]).all()


def test_an_update_of_a_model_without_masks_merges_and_applies(
    gpt2: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    base, tuned = gpt2
    update = tmp_path / "u.dare"
    words = ("diff", base, tuned, "-o", update, "--drop-rate", "0", "--values", "f32")
    assert command(capsys, *words)[0] == 0
    assert command(capsys, "apply", base, update, "-o", tmp_path / "applied")[0] == 0
    out, _ = merged(capsys, tmp_path / "out", base, update)
    assert worst(out, tensors(tmp_path / "applied")) == 0
    right = {n.removeprefix("transformer."): v for n, v in tensors(tuned).items()}
    assert worst(right, {n: v for n, v in out.items() if n in right}) < 1e-6


def test_buffers_that_base_lacks_are_no_strangers(base: Path, tmp_path: Path, capsys: Any) -> None:
    import torch

    tuned = llama(tmp_path / "a", 1)
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    rewrite(tuned, lambda t: t | {name: torch.ones(4) for name in names})
    out, _ = merged(capsys, tmp_path / "out", base, tuned)
    assert set(out) == set(tensors(base))
    assert worst(tensors(tuned), out) < 1e-6


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_wrapped_model_is_the_model(
    base: Path, tmp_path: Path, capsys: Any, wrapper: str
) -> None:
    tuned = llama(tmp_path / "a", 1)
    right = tensors(tuned)
    rewrite(tuned, lambda t: {wrapper + name: value for name, value in t.items()})
    out, _ = merged(capsys, tmp_path / "out", base, tuned)
    assert worst(out, right) < 1e-6


def test_another_depth_is_said(base: Path, tmp_path: Path, capsys: Any) -> None:
    for layers in (1, 3):
        tuned = llama(tmp_path / f"a{layers}", 1, num_hidden_layers=layers)
        said = refused(capsys, tmp_path / "out", base, tuned)
        assert f"num_hidden_layers {layers}, BASE's 2" in said and "depth" in said


def test_another_width_is_said(base: Path, tmp_path: Path, capsys: Any) -> None:
    tuned = llama(tmp_path / "a", 1, hidden_size=16)
    said = refused(capsys, tmp_path / "out", base, tuned)
    assert "hidden_size 16, BASE's 32" in said and "width" in said


def test_heads_of_another_number_are_no_tasks_own(base: Path, tmp_path: Path, capsys: Any) -> None:
    tuned = llama(tmp_path / "a", 1, num_key_value_heads=4)
    said = refused(capsys, tmp_path / "out", base, tuned)
    assert "num_key_value_heads 4, BASE's 2" in said and "head, leave" not in said


def test_a_head_that_predicts_further_is_left_out_as_offered(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    """DeepSeek's and GLM's checkpoints have it, what transformers saves of them has not."""
    tuned, right = llama(tmp_path / "a", 1), tensors(llama(tmp_path / "a", 1))
    shutil.copytree(base, tmp_path / "more")

    def deeper(t: dict[str, Any]) -> dict[str, Any]:
        third = {n.replace(".1.", ".2."): value for n, value in t.items() if "layers.1." in n}
        return t | third | {"model.layers.2.eh_proj.weight": t["lm_head.weight"]}

    rewrite(tmp_path / "more", deeper)
    for one, other in ((tmp_path / "more", tuned), (base, tmp_path / "more")):
        place = tmp_path / f"out-of-{one.name}"
        said = refused(capsys, place, one, other)
        assert "behind the 2 layers that both configurations count" in said
        out, _ = merged(capsys, place, one, other, *offered(said))
        want = right if other is tuned else tensors(base)
        assert worst(out, want) < 1e-6
        assert ("model.layers.2.eh_proj.weight" in out) == (one != base)


def test_a_model_that_ties_its_head_where_base_has_one_is_said(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    tuned = llama(tmp_path / "a", 1, tie_word_embeddings=True)
    said = refused(capsys, tmp_path / "out", base, tuned)
    assert "ties its head to its embeddings (tie_word_embeddings), BASE has 'lm_head" in said
    out, _ = merged(capsys, tmp_path / "out", base, tuned, *offered(said))
    assert worst(out, tensors(tuned) | {"lm_head.weight": tensors(base)["lm_head.weight"]}) < 1e-6


def test_another_vocabulary_is_said_and_what_is_offered_works(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    tuned = llama(tmp_path / "a", 1, vocab_size=70)
    said = refused(capsys, tmp_path / "out", base, tuned)
    assert "a vocabulary of 70 rows, BASE has 64" in said
    out, _ = merged(capsys, tmp_path / "out", base, tuned, *offered(said))
    right = tensors(tuned)
    assert worst(out, {n: v for n, v in right.items() if v.shape[0] != 70}) < 1e-6


def test_another_architecture_is_said(
    base: Path, gpt2: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    said = refused(capsys, tmp_path / "out", base, gpt2[1])
    assert "another model than BASE (gpt2, BASE is llama)" in said


def test_empty_tensors_are_a_save_that_went_wrong(base: Path, tmp_path: Path, capsys: Any) -> None:
    import torch

    tuned = llama(tmp_path / "a", 1)
    rewrite(tuned, lambda t: {n: (torch.zeros(0) if "k_proj" in n else v) for n, v in t.items()})
    said = refused(capsys, tmp_path / "out", base, tuned)
    assert "2 of 21 tensors are empty" in said and "ZeRO-3" in said


def test_heads_of_all_layers_are_offered_at_once(base: Path, tmp_path: Path, capsys: Any) -> None:
    import torch

    tuned = llama(tmp_path / "a", 1)
    rewrite(
        tuned,
        lambda t: t | {f"model.layers.{i}.probe.weight": torch.ones(2, 2) for i in range(2)}
        | {"score.weight": torch.ones(3, 32)},
    )  # fmt: skip
    said = refused(capsys, tmp_path / "out", base, tuned)
    assert "has 3 tensors" in said
    out, _ = merged(capsys, tmp_path / "out", base, tuned, *offered(said))
    assert worst(tensors(tuned), out) < 1e-6


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tied base that stores its head too, a model that does, and one that does not."""
    folder = tmp_path_factory.mktemp("tied")
    both = lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]}  # noqa: E731
    paths = [llama(folder / f"m{seed}", seed, tie_word_embeddings=True) for seed in range(3)]
    for path in paths[:2]:
        rewrite(path, both)
    return paths[0], paths[1], paths[2]


@pytest.mark.parametrize("words", [SOLO, ("-m", "ties", "--option", "trim=0")])
def test_a_tensor_under_two_names_stays_one(
    tied: tuple[Path, Path, Path], tmp_path: Path, capsys: Any, words: tuple[str, ...]
) -> None:
    out, said = merged(capsys, tmp_path / "out", *tied, *words, "--drop-rate", "0.5")
    assert (out["lm_head.weight"] == out["model.embed_tokens.weight"]).all()
    assert "one tensor in BASE" not in said
    # As where it is stored once: the same masks, the same values.
    once = tmp_path / "base"
    llama(once, tie_word_embeddings=True)
    alone, _ = merged(
        capsys, tmp_path / "alone", once, tied[1], tied[2], *words, "--drop-rate", "0.5"
    )
    assert worst(out, alone) == 0


def test_an_update_carries_a_tied_tensor_once(
    tied: tuple[Path, Path, Path], tmp_path: Path, capsys: Any
) -> None:
    base, tuned, _ = tied
    update = tmp_path / "u.dare"
    assert command(capsys, "diff", base, tuned, "-o", update, "--drop-rate", "0.5")[0] == 0
    status, said = command(capsys, "inspect", update, "--json")
    parameters = int(re.search(r'"parameters": (\d+)', said)[1])  # type: ignore[index]
    assert status == 0 and parameters == sum(v.size for v in tensors(base).values()) - 64 * 32
    assert (
        command(capsys, "apply", base, update, "-o", tmp_path / "o", "--dtype", "bfloat16")[0] == 0
    )
    out = tensors(tmp_path / "o")
    assert (out["lm_head.weight"] == out["model.embed_tokens.weight"]).all()
    assert not (out["lm_head.weight"] == tensors(base)["lm_head.weight"]).all()


def test_a_head_that_was_untied_is_not_lost_in_silence(
    tied: tuple[Path, Path, Path], tmp_path: Path, capsys: Any
) -> None:
    base = tied[0]
    tuned = llama(tmp_path / "a", 1, tie_word_embeddings=True)
    rewrite(tuned, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * 2})
    said = refused(capsys, tmp_path / "out", base, tuned)
    assert "ties them" in said and "'lm_head.weight'" in said
    out, _ = merged(capsys, tmp_path / "out", base, tuned, *offered(said))
    assert (out["lm_head.weight"] == out["model.embed_tokens.weight"]).all()
    assert np.abs(out["lm_head.weight"] - tensors(tuned)["model.embed_tokens.weight"]).max() < 1e-6


@pytest.mark.parametrize("tie", [True, False])
def test_layers_that_begin_alike_are_not_tied(tmp_path: Path, capsys: Any, tie: bool) -> None:
    """A model made deeper by copying layers, as passthrough merges make it."""

    def deeper(tensors: dict[str, Any]) -> dict[str, Any]:
        pairs = ((n, n.replace("layers.0.", "layers.1.")) for n in tensors if "layers.0." in n)
        return {**tensors, **{new: tensors[name] for name, new in pairs}}

    base = llama(tmp_path / "base", tie_word_embeddings=tie)
    rewrite(base, deeper)
    tuned = llama(tmp_path / "tuned", 1, tie_word_embeddings=tie)
    out, said = merged(capsys, tmp_path / "out", base, tuned)
    assert "one tensor in BASE" not in said
    assert worst(out, tensors(tuned)) < 1e-6


def test_equal_tensors_of_an_untied_base_may_part(base: Path, tmp_path: Path, capsys: Any) -> None:
    from shutil import copytree

    start = copytree(base, tmp_path / "base")
    rewrite(start, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
    tuned = llama(tmp_path / "a", 1)
    out, said = merged(capsys, tmp_path / "out", start, tuned)
    assert "two" in said
    assert worst(out, tensors(tuned)) < 1e-6


def test_copies_that_only_the_model_stores_are_seen_as_such(tmp_path: Path, capsys: Any) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    base, tuned = tmp_path / "base", tmp_path / "a"
    T5ForConditionalGeneration(config).save_pretrained(base)
    T5ForConditionalGeneration(config).save_pretrained(tuned)
    right = tensors(tuned)
    rewrite(
        tuned,
        lambda t: (
            t
            | {f"{part}.embed_tokens.weight": t["shared.weight"] for part in ("encoder", "decoder")}
        ),
    )
    out, _ = merged(capsys, tmp_path / "out", base, tuned)
    assert set(out) == set(right) and worst(out, right) < 1e-5
