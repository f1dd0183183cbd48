"""BASE as all models of one job see it: which of its tensors are merged, which follow others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dare_agg.checkpoint import Checkpoint, open_checkpoint
from dare_agg.checkpoint.config import config_of
from dare_agg.checkpoint.embeddings import is_token_tensor
from dare_agg.checkpoint.families import is_buffer
from dare_agg.checkpoint.model import mapped
from dare_agg.checkpoint.tied import copies_in
from dare_agg.errors import LayoutError
from dare_agg.offline.adapters.folder import is_adapter
from dare_agg.offline.differences import exclusion
from dare_agg.offline.fitting import Fit, fit_to
from dare_agg.offline.integers import check_same_masks
from dare_agg.offline.rows import BASE
from dare_agg.offline.stacks import layered
from dare_agg.offline.vocabulary import UPDATE, Alignment, Target
from dare_agg.vectors.forms import is_mask
from dare_agg.vectors.layout import Layout
from dare_agg.vectors.patterns import compile_patterns, matches


@dataclass(frozen=True)
class OpenedBase:
    """BASE with the layout that it shares with a job's models.

    ``followers`` are tied names outside of the layout and the tensor of it whose values they
    get; ``fits`` are the models that are checkpoints, by their place among the models; ``aligned``
    is whether their rows are in the order of ``target``'s tokens, not in the files'.
    """

    checkpoint: Checkpoint
    layout: Layout
    followers: Mapping[str, str]
    fits: Mapping[int, Fit]
    warnings: tuple[str, ...] = ()
    target: Target | None = None
    aligned: bool = False


def open_base(
    path: Path,
    models: Sequence[Path],
    exclude: Sequence[str] = (),
    alignment: Alignment | None = None,
    stacks: Mapping[int, Checkpoint] | None = None,
) -> OpenedBase:
    """Open BASE, and find how the checkpoints among ``models`` stand to it.

    Tensors that BASE holds twice are one; masks of minus infinity, and buffers that a model lacks,
    stay BASE's. With an
    ``alignment`` all have a row for each token of its ``target``. ``stacks`` are those that are
    put together of pieces (`dare_agg.offline.stacks`). Raises `LayoutError` where a
    model is no tuned BASE, saying in which way.
    """
    made = stacks or {}
    base = made.get(BASE) or open_checkpoint(path)
    opened = {
        number: made.get(number) or open_checkpoint(model)
        for number, model in enumerate(models)
        if number in made or (model.suffix != UPDATE and not is_adapter(model))
    }
    target, stored = None, base
    if alignment is not None:
        base, opened, target = alignment.align(base, opened)
        if base is not stored:
            alignment.check_others([m for n, m in enumerate(models) if n not in opened])
    patterns = compile_patterns(exclude)
    masks = {name for name in base.names if is_mask(mapped(base, name), infinite=True)}  # type: ignore[arg-type]
    unlike = layered(base) if BASE in made else set()
    copies = copies_in(base, unlike)
    fits: dict[int, Fit] = {}
    apart: dict[str, str] = {}
    lacking: set[str] = set()
    warnings = list(target.warnings) if target else []
    ties = config_of(base).get("tie_word_embeddings")
    for number, model in enumerate(models):
        if model.suffix == UPDATE:
            missing, own = _of_update(model, base, {**copies, **{m: m for m in masks}}, exclude)
            own -= masks
            lacking |= missing
        elif number not in opened:
            continue
        else:
            fits[number] = fit = fit_to(opened[number], base, copies, patterns, masks)
            check_same_masks(base, fit.model, fit.tensors, masks, patterns)
            lacking |= fit.lacking
            own = {name for name in fit.apart if not matches(name, patterns)}
            heads = {n for n in own if is_token_tensor(n) or is_token_tensor(copies[n])}
            if heads and ties:
                raise LayoutError(f"{model} {_untied(heads, copies)}; {exclusion(heads, base)}")
        for name in sorted(own - apart.keys()):
            apart[name] = str(model)
    for name, model_path in apart.items():
        warnings.append(
            f"{name!r} and {copies[name]!r} are one tensor in BASE and two in {model_path}: they "
            "are merged as two, and OUT does not load as tied"
        )
    if apart:
        copies = copies_in(base, {*apart, *unlike})
    layout = base.layout(exclude, {*copies, *lacking, *masks})
    followers = {name: first for name, first in copies.items() if first in layout}
    return OpenedBase(base, layout, followers, fits, tuple(warnings), target, base is not stored)


def _of_update(
    path: Path, base: Checkpoint, copies: Mapping[str, str], exclude: Sequence[str]
) -> tuple[set[str], set[str]]:
    """BASE's buffers that an update was made without, and the copies that it holds apart."""
    from dare_agg.codec.update_file import read_update_file

    _, header = read_update_file(path)
    own = {name for name in copies if name in header.layout}
    there = base.layout(exclude, {*copies} - own)
    missing = [entry for entry in there.entries if entry.name not in header.layout]
    if all(is_buffer(entry.name, entry.shape) for entry in missing):
        return {entry.name for entry in missing}, own
    return set(), own


def _untied(apart: set[str], copies: Mapping[str, str]) -> str:
    name = min(apart)
    return (
        f"holds {name!r} and {copies[name]!r} as two tensors, BASE ties them (its config.json has "
        "tie_word_embeddings true) and so would OUT"
    )
