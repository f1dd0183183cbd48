"""Offline merging of checkpoints, adapters and updates into a model on disk.

Everything is checked before any work: names, shapes, dtypes, bases, options, room on the
disk, non-finite values. Models are put in the order of their contents first, so the order in
which they were named changes nothing (unless the recipe's ``order`` is "given"); weights, seeds and
statistics travel with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint import (
    Carried,
    CheckpointWriter,
    Left,
    open_checkpoint,
    parse_dtype,
    plan_like,
)
from dare_agg.checkpoint.carried import CARD
from dare_agg.checkpoint.names import under_names
from dare_agg.checkpoint.tied import names_of
from dare_agg.errors import ConfigError, MergeError
from dare_agg.merge.engine import prepare_merge, run_tiles
from dare_agg.merge.task import Scratch, Statistics, is_sparse
from dare_agg.offline.base import OpenedBase, open_base
from dare_agg.offline.beside_the_body import left_beside
from dare_agg.offline.card import model_card
from dare_agg.offline.chat_template import check_out, write_template
from dare_agg.offline.opening import OpenedModel, described, open_models
from dare_agg.offline.parameters import Choices, Gradient, Place, by_tensor, order_key, places
from dare_agg.offline.range_check import range_warnings
from dare_agg.offline.recipe import ModelInput, Recipe, settled_options
from dare_agg.offline.sparsify import sparsified
from dare_agg.offline.stacks import own_shards, stacked, state_layers, stored_dtype
from dare_agg.offline.tokenizer_choice import carry_model, chosen_tokenizer, tokenizer_warnings
from dare_agg.offline.vocabulary import alignment
from dare_agg.vectors.contents import content_order, sketch
from dare_agg.vectors.layout import Layout
from dare_agg.vectors.patterns import compile_patterns, matches
from dare_agg.vectors.sources import CachedSource, DeltaSource, SparseSource

# Elements of a tile, and at most of all models' tiles together: memory does not grow with them.
TILE, _IN_ALL, _SMALLEST_TILE = 1 << 17, 1 << 20, 1 << 14
# Listing survivors has a cost for each tile, so sparse merges take larger ones: so many survivors
# of each model, which are two whole steps of its mask, in a tile that stays in a cache.
_LISTED, _LISTED_IN_ALL, _LARGEST_TILE = 1 << 15, 1 << 19, 1 << 19


@dataclass(frozen=True)
class MergeReport:
    """What an offline merge did. ``models`` are in the order in which they were added; ``carried``
    and ``left`` are files of the base's folder (`dare_agg.checkpoint.carry_files`)."""

    out: str
    method: str
    parameters: int
    tensors: int
    excluded: tuple[str, ...]
    models: tuple[dict[str, Any], ...]
    carried: tuple[str, ...]
    left: tuple[Left, ...]
    warnings: tuple[str, ...]


def merge_offline(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    tile: int | None = None,
    threads: int = 1,
    check: bool = True,
    carry_code: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge as the recipe says and write ``out`` (a ``.safetensors`` file or a folder).

    ``tile`` and ``threads`` change speed and memory, never a bit of the result. ``check``
    looks for non-finite values first; ``carry_code`` takes the base's own Python files along.
    Raises a `DareError` before any work where anything
    does not fit; ``out`` appears complete or not at all.
    """
    located = recipe.with_files_located()
    numbers = {model.path: number for number, model in enumerate(recipe.models)}
    with (
        stacked(located, out, _made) as stacks,
        alignment(recipe.vocabulary, recipe.tokenizer, numbers, out) as rows,
    ):
        paths = [model.path for model in located.models]
        ground = open_base(located.base, paths, located.exclude, rows, stacks)
        return _merged(
            recipe, located, ground, out, overwrite=overwrite, tile=tile, threads=threads,
            check=check, carry_code=carry_code, on_progress=on_progress,
        )  # fmt: skip


def _made(base: Path, adapter: Path, out: Path) -> None:
    """Write the model of a base and an adapter, in full precision."""
    models = [ModelInput(path=adapter)]
    merge_offline(Recipe(base=base, models=models, method="task-arithmetic", dtype="float32"), out)


def _merged(
    given: Recipe,
    recipe: Recipe,
    ground: OpenedBase,
    out: Path,
    *,
    overwrite: bool,
    tile: int | None,
    threads: int,
    check: bool,
    carry_code: bool,
    on_progress: Callable[[int, int], None] | None,
) -> MergeReport:
    """Merge what has been opened; ``given`` is the recipe with the names that were given."""
    base, layout, target = ground.checkpoint, ground.layout, ground.target
    if not layout.size:
        raise MergeError(f"{recipe.base} has no parameter left to merge; exclude less")
    cached = CachedSource(base.reader(layout))
    opened = open_models(recipe.models, ground, cached, recipe.exclude)
    dtype = parse_dtype(recipe.dtype) if recipe.dtype else stored_dtype(recipe.base_pieces)
    plans = plan_like(base, out, {*layout.names, *ground.followers}, dtype)
    if recipe.base_pieces:
        plans = own_shards(plans, base)
    if recipe.chat_template:
        check_out(recipe.chat_template, out)
    where = [(a.path, b.path) for a, b in zip(given.models, recipe.models, strict=True)]
    tokenizer = chosen_tokenizer(recipe.tokenizer, out, plans, dict(where))
    with CheckpointWriter(out, plans, {"format": "pt"}, overwrite) as writer:
        if check:
            for checkpoint in [base, *(m.checkpoint for m in opened if m.checkpoint)]:
                checkpoint.check_finite(layout)
        warnings = [
            *ground.warnings, *(w for m in opened for w in m.warnings),
            *range_warnings(opened, recipe), *_gram_warnings(recipe, opened),
        ]  # fmt: skip
        if recipe.tokenizer is None and not writer.single:
            warnings += tokenizer_warnings(
                base.folder, where, tokens=target is None, templates=recipe.chat_template is None
            )
        wholes = {model.number: model.source for model in opened}
        ordered = sparsified(opened, recipe, layout)
        names = [sketch(m.source) for m in ordered]
        order = list(range(len(ordered)))
        if recipe.order == "contents":
            order = content_order(
                [m.source for m in ordered],
                names,
                [(order_key(m.given.weight), m.given.seed or 0, m.number) for m in ordered],
            )
        ordered = [ordered[i] for i in order]
        weights, scaling = tensor_weights(recipe, ordered, layout)
        used = tile or _tile([m.source for m in ordered])
        kernel, task = prepare_merge(
            layout,
            [m.source for m in ordered],
            recipe.method,
            weights=weights,
            scaling=scaling,
            options=_options(recipe, ordered, layout),
            tile=used,
            base=cached,
            writes_model=True,
            statistics=_statistics_of(recipe, ordered, wholes, layout),
        )

        written = names_of(layout, ground.followers)

        def work(lo: int, hi: int, scratch: Scratch) -> None:
            merged = scratch.get("merged", hi - lo)
            # Read first: the survivors' base values are then picked from this tile.
            cached.tile(lo, hi)
            kernel(lo, hi, merged, scratch)
            if not task.writes_model:
                merged += cached.tile(lo, hi)
            for entry, first, last in layout.pieces(lo, hi):
                at = entry.offset - lo
                for name in written[entry.name]:
                    writer.write(name, first, merged[at + first : at + last])
            if on_progress is not None:
                on_progress(hi, layout.size)

        run_tiles(task, work, threads)
        for name in (*layout.excluded, *layout.buffers):
            if name not in ground.followers:
                writer.write_raw(name, 0, base.raw(name))
        models = tuple(
            described(given.models[m.number], m.kind, names[i])
            for m, i in zip(ordered, order, strict=True)
        )
        carried = Carried()
        if not writer.single:
            carried = carry_model(
                base.folder, tokenizer, writer.folder, plans,
                code=carry_code, skip=(CARD, *base.weights),
            )  # fmt: skip
            if recipe.base_pieces:
                state_layers(writer.folder, recipe.base_pieces)
            if target is not None:
                target.write(writer.folder)
            if recipe.chat_template:
                folders = [recipe.base, *(model.path for model in recipe.models)]
                warnings += write_template(recipe.chat_template, writer.folder, folders)
            card = model_card(given.as_dict(), models, layout, recipe.row)
            (writer.folder / "README.md").write_text(card, encoding="utf-8")
    beside = left_beside(base.folder, [model.path for model in recipe.models], out)
    return MergeReport(
        str(out), recipe.row.name, layout.size, len(layout.entries),
        layout.excluded, models, carried.files, (*carried.left, *beside), tuple(warnings),
    )  # fmt: skip


def _tile(sources: list[DeltaSource]) -> int:
    if not all(is_sparse(source) for source in sources):
        return max(_SMALLEST_TILE, min(TILE, _IN_ALL // len(sources)))
    share = max(s.survivors / s.size for s in sources if isinstance(s, SparseSource))
    listed = min(_LISTED, _LISTED_IN_ALL // len(sources))
    return max(TILE, min(_LARGEST_TILE, round(listed / share)))


def tensor_weights(
    recipe: Recipe, ordered: list[OpenedModel], layout: Layout
) -> tuple[NDArray[np.float64] | None, float | NDArray[np.float64]]:
    """Weights and scaling as the engine takes them; rules, gradients and filters make them
    (…, tensors).

    Raises `ConfigError` for a rule that matches no tensor, a tensor that no filter matches.
    """
    given = [m.given.weight for m in ordered]
    weighted = all(weight is not None for weight in given)
    plain = all(weight is None or isinstance(weight, float) for weight in given)
    if not recipe.rules and plain and isinstance(recipe.scaling, float):
        return np.array(given, np.float64) if weighted else None, recipe.scaling
    where = _places(layout)
    default = 1 / len(ordered) if recipe.row.mean else 1.0
    table = np.stack(
        [
            by_tensor(default if m.given.weight is None else m.given.weight, where, _weight_of(m))
            for m in ordered
        ]
    )
    scaling = by_tensor(recipe.scaling, where, "scaling")
    for rule in recipe.rules:
        pattern = compile_patterns([rule.match])
        hits = np.array([matches(e.name, pattern) for e in layout.entries])
        if not hits.any():
            raise ConfigError(f"rule {rule.match!r} matches no tensor; see dare-agg diagnose")
        if rule.scaling is not None:
            scaling[hits] = rule.scaling
        if rule.weights is not None:
            for row, model in enumerate(ordered):
                table[row, hits] = rule.weights[model.number]
    return table, scaling


def _weight_of(model: OpenedModel) -> str:
    return f"{model.given}: weight"


def _places(layout: Layout) -> list[Place]:
    return places(layout.names, (*layout.names, *layout.excluded, *layout.buffers))


def _options(recipe: Recipe, ordered: list[OpenedModel], layout: Layout) -> dict[str, Any]:
    """The recipe's options, per-model values in the models' order, parameters by tensor."""
    options = settled_options(recipe.row, recipe.options)
    if "seed" in recipe.row.options:
        options.setdefault("seed", recipe.seed)
    for name, value in options.items():
        if isinstance(value, tuple) and len(value) == len(ordered):
            options[name] = tuple(value[m.number] for m in ordered)
    own = sorted({name for m in ordered for name in m.given.options})
    for name in own:
        option = recipe.row.options[name]
        if not option.per_model:
            raise ConfigError(f"option {name} is for all models; give it once, not for a model")
        common = options.get(name, option.default)
        common = common if isinstance(common, tuple) else [common] * len(ordered)
        options[name] = tuple(
            m.given.options.get(name, c) for m, c in zip(ordered, common, strict=True)
        )
        if any(v is None for v in options[name]):
            raise ConfigError(f"option {name} is given for some models only; give it for all")
    return {name: _arrays(recipe, name, value, layout, ordered) for name, value in options.items()}


def _arrays(
    recipe: Recipe, name: str, value: Any, layout: Layout, ordered: list[OpenedModel]
) -> Any:
    """An option with a parameter in it as an array by tensor; any other as it is."""
    alone = not isinstance(value, tuple)
    if not any(isinstance(v, Gradient | Choices) for v in ((value,) if alone else value)):
        return value
    where = _places(layout)
    if alone and not recipe.row.options[name].per_model:
        return by_tensor(value, where, f"option {name}")
    each = [value] * len(ordered) if alone else value
    return np.stack([by_tensor(v, where, f"option {name}") for v in each])


def _statistics_of(
    recipe: Recipe,
    ordered: list[OpenedModel],
    wholes: Mapping[int, DeltaSource],
    layout: Layout,
) -> list[Statistics]:
    """What the method knows of each model beside its delta, in the models' order."""
    if recipe.row.own_grams and recipe.options.get("gram") != "dropped":
        known = [m.directions is not None for m in ordered]
        if recipe.drops or any(known):
            return [
                wholes[m.number] if m.directions is None else m.directions.decoded()
                for m in ordered
            ]
    return [
        _statistics(model.given.statistics, recipe.row.statistics, layout)
        for model in ordered
        if model.given.statistics
    ]


def _gram_warnings(recipe: Recipe, opened: list[OpenedModel]) -> list[str]:
    """Updates without directions, whose survivors say little of a Gram matrix."""
    if not recipe.row.own_grams:
        return []
    return [
        f"{model.given}: {recipe.row.name} makes Gram matrices of its survivors, which are mostly "
        "noise; make it with dare-agg diff --gram 8"
        for model in opened
        if model.kind == "update" and model.directions is None
    ]


def _statistics(path: Path, kind: str | None, layout: Layout) -> Mapping[str, NDArray[Any]]:
    """Open a statistics file under the base's names, whatever prefix its own have."""
    checkpoint = open_checkpoint(path)
    found = checkpoint.metadata.get("kind", kind)
    if found != kind:
        raise MergeError(
            f"{path} holds {found} statistics, {kind} is needed; make it with dare-agg statistics "
            f"--kind {kind}"
        )
    shapes = {entry.name: entry.shape for entry in layout.entries}
    tensors = under_names(checkpoint.tensors, checkpoint.shapes, shapes)
    checkpoint = replace(checkpoint, tensors=tensors)
    arrays = {}
    for name, info in checkpoint.tensors.items():
        stored = checkpoint.raw(name)
        arrays[name] = stored.reshape(info.shape) if info.dtype == "F32" else checkpoint.array(name)
    return arrays
