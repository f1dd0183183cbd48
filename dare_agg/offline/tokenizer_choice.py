"""Whose tokenizer OUT gets: BASE's, unless another folder is named; a difference is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dare_agg.checkpoint import Carried, TensorPlan, carry_files, state_dtype
from dare_agg.checkpoint.carried import is_tokenizer_file
from dare_agg.checkpoint.embeddings import is_token_tensor
from dare_agg.checkpoint.hub import located
from dare_agg.checkpoint.hub_names import missing_path
from dare_agg.checkpoint.tokenizer import (
    carry_with_tokenizer,
    differences,
    has_tokenizer,
    read_tokenizer,
)
from dare_agg.errors import ConfigError
from dare_agg.offline.recipe import BASES_TOKENIZER


def chosen_tokenizer(
    word: str | None,
    out: Path,
    plans: Mapping[str, TensorPlan],
    models: Mapping[Path, Path] | None = None,
) -> Path | None:
    """Return the folder that ``--tokenizer`` names; None for BASE's.

    ``models`` are where the models lie, by the paths or hub names that were given for them.
    Raises `ConfigError` for a folder without a tokenizer, for one whose tokens have no row in
    ``plans``, the tensors of ``out``, and where ``out`` is a file.
    """
    if word in (None, BASES_TOKENIZER):
        return None
    if out.suffix == ".safetensors":
        raise ConfigError(f"--tokenizer {word}: {out} is a file, which has none; name a folder")
    folder = (models or {}).get(Path(str(word))) or located(str(word))
    if not folder.exists():
        raise missing_path(folder)
    if not has_tokenizer(folder):
        raise ConfigError(
            f"--tokenizer {word} has no tokenizer; give base, or a model's folder that has one"
        )
    rows = [p.shape[0] for n, p in plans.items() if is_token_tensor(n) and len(p.shape) == 2]
    added = read_tokenizer(folder).added
    token = max(added, key=lambda text: added[text]) if added else ""
    if rows and added and added[token] >= min(rows):
        raise ConfigError(
            f"--tokenizer {word} has token {token!r} at {added[token]}, OUT has {min(rows)} rows "
            "of embeddings; give base, or a BASE that has a row for each of its tokens"
        )
    return folder


def tokenizer_warnings(
    base: Path | None,
    models: Sequence[tuple[Path, Path]],
    *,
    tokens: bool = True,
    templates: bool = True,
) -> list[str]:
    """Say which models have another chat template, end token or other tokens than BASE.

    ``models`` are pairs of how a model was named and where it lies; without ``tokens`` or
    ``templates`` those are not compared.
    """
    if base is None:
        return []
    own = read_tokenizer(base)
    told = []
    for name, folder in models:
        if not has_tokenizer(folder):
            continue
        if not has_tokenizer(base):
            found, keeps = "has a tokenizer, BASE has none", "OUT gets none"
        else:
            its = read_tokenizer(folder)
            its = its if tokens else replace(its, added={})
            other = differences(own, its if templates else replace(its, templates={}))
            if not other:
                continue
            listed = ", ".join(other[:-1]) + (" and " if other[1:] else "") + other[-1]
            found = f"differs from BASE in its {listed}"
            keeps = "OUT has BASE's (--tokenizer base, if that is meant)"
        told.append(f"{name} {found}: {keeps}; --tokenizer {name} takes its own")
    return told


def carry_model(
    base: Path | None,
    tokenizer: Path | None,
    target: Path,
    plans: Mapping[str, TensorPlan],
    *,
    code: bool = False,
    skip: tuple[str, ...] = (),
) -> Carried:
    """Carry all that OUT needs beside its tensors: BASE's files, the tokenizer's, the true dtype.

    Without a folder of BASE it is the tokenizer alone.
    """
    if base is None:
        if tokenizer is None:
            return Carried()
        return carry_files(tokenizer, target, code=code, only=is_tokenizer_file)
    carried = carry_with_tokenizer(base, tokenizer, target, code=code, skip=skip)
    state_dtype(target, plans)
    return carried
