"""Tied tensors in a secure one-shot merge: once over the wire, one value under every name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from dare_agg.errors import LayoutError, ProtocolError
from dare_agg.flower.secure.merge import SecureMerge, secure_merge
from dare_agg.flower.secure.mod import secure_mod, secure_queries
from dare_agg.secure.own_model import open_own, open_public
from dare_agg.secure.roster import read_roster
from dare_agg.secure.settings import SecureSettings
from tests.tiny import llama, rewrite, tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DROP_RATE = 0.5


def with_head(folder: Path) -> Path:
    """Let a tied model's file hold its head too, as other writers than transformers do."""
    rewrite(folder, lambda t: {**t, HEAD: t[EMBEDDING]})
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied base that holds its head twice; models with it once, twice, under wrappers' names,
    with the head alone."""
    folder = tmp_path_factory.mktemp("tied")
    with_head(llama(folder / "base", tie_word_embeddings=True))
    for party in range(4):
        llama(folder / f"tuned{party}", party + 1, tie_word_embeddings=True)
    with_head(folder / "tuned1")
    rewrite(with_head(folder / "tuned2"), lambda t: {f"_orig_mod.{n}": v for n, v in t.items()})
    rewrite(folder / "tuned3", lambda t: {HEAD if n == EMBEDDING else n: v for n, v in t.items()})
    return folder


@pytest.fixture
def merge(memory_grid: Any, keys: Any, tmp_path: Path) -> Callable[..., SecureMerge]:
    """A secure merge of a folder's four models, written to ``tmp_path``."""
    roster = read_roster(keys(4) / "roster.json")

    def run(folder: Path, **words: Any) -> SecureMerge:
        app = ClientApp(mods=[secure_mod])
        secure_queries(app)
        grid = memory_grid(
            app,
            4,
            node_config=lambda p: {
                "partition-id": p,
                "base-path": str(folder / "base"),
                "model-path": str(folder / f"tuned{p}"),
                "merged-path": str(tmp_path / f"merged{p}"),
            },
        )
        settings = SecureSettings("mean", drop_rate=str(DROP_RATE), clip=0.1)
        return secure_merge(
            grid, folder / "base", roster, settings, run="x", parties=4, out=tmp_path / "merged",
            stage_seconds=10, **words,
        )  # fmt: skip

    return run


def test_a_tied_tensor_travels_once_and_stays_one(
    files: Path, tmp_path: Path, merge: Callable[..., SecureMerge]
) -> None:
    result = merge(files)
    base, merged = tensors(files / "base"), tensors(tmp_path / "merged")
    assert result.measurements["parameters"] == sum(a.size for a in base.values()) - 64 * 32
    assert HEAD not in result.layout
    assert np.array_equal(merged[HEAD], merged[EMBEDDING])
    tuned = [tensors(files / f"tuned{p}") for p in (0, 1)]
    tuned += [{n.removeprefix("_orig_mod."): a for n, a in tensors(files / "tuned2").items()}]
    tuned += [tensors(files / "tuned3")]
    tuned[3][EMBEDDING] = tuned[3][HEAD]
    for name in result.layout.names:
        step = merged[name] - base[name]
        mean = np.mean([t[name] - base[name] for t in tuned], axis=0)
        touched = step != 0
        assert np.abs(step - mean / (1 - DROP_RATE))[touched].max() < 5e-5
    assert result.measurements["result_at"] == result.measurements["parties"]
    assert tensors(tmp_path / "merged0").keys() == tensors(files / "tuned0").keys()
    for party, names in enumerate([(EMBEDDING,), (EMBEDDING, HEAD), None, (HEAD,)]):
        own = tensors(tmp_path / f"merged{party}")
        for name in names or ("_orig_mod." + EMBEDDING, "_orig_mod." + HEAD):
            assert np.array_equal(own[name], merged[EMBEDDING])


def test_the_merged_models_load_as_tied(
    files: Path, tmp_path: Path, merge: Callable[..., SecureMerge]
) -> None:
    from transformers import AutoModelForCausalLM

    merge(files)
    for name in ("merged", "merged1"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        there = model.lm_head.weight.detach().numpy()
        assert np.array_equal(there, tensors(tmp_path / name)[EMBEDDING])


def untied(files: Path, folder: Path) -> Path:
    """The same parties, but that training parted one's head from its embeddings."""
    shutil.copytree(files, folder)
    rewrite(folder / "tuned1", lambda t: {**t, HEAD: t[HEAD] + 0.01})
    return folder


def test_a_model_that_was_untied_is_named(
    files: Path, tmp_path: Path, merge: Callable[..., SecureMerge]
) -> None:
    folder = untied(files, tmp_path / "files")
    with pytest.raises(ProtocolError, match=r"site 1: .*'lm_head.weight' and .* as two tensors"):
        merge(folder)
    # What the message advises: every party keeps its own head.
    before = tensors(folder / "tuned1")[HEAD]
    merge(folder, exclude=["^lm_head"])
    assert np.array_equal(tensors(tmp_path / "merged1")[HEAD], before)
    assert np.array_equal(*(tensors(tmp_path / "merged")[name] for name in (HEAD, EMBEDDING)))


def test_a_head_that_only_began_as_the_embeddings_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    base = with_head(llama(tmp_path / "base", tie_word_embeddings=False))
    assert HEAD in open_public(base).layout
    tuned = llama(tmp_path / "tuned", 1, tie_word_embeddings=False)
    delta = open_own(base, tuned).delta()
    entry = open_public(base).layout[HEAD]
    right = tensors(tuned)[HEAD] - tensors(base)[HEAD]
    assert np.array_equal(delta[entry.offset : entry.stop].reshape(entry.shape), right)
    # The same files where nothing says that the head is of its own.
    (base / "config.json").unlink()
    with pytest.raises(LayoutError, match="the base ties them"):
        open_own(base, tuned)
