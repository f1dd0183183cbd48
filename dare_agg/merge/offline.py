"""Offline merging of checkpoints, adapters and updates into a model on disk.

Everything is checked before any work: names, shapes, dtypes, bases, options, room on the
disk, non-finite values. Models are put in the order of their contents first, so the order in
which they were named changes nothing; weights, seeds and statistics travel with them.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from dare_agg.card import model_card
from dare_agg.checkpoint import (
    Checkpoint,
    CheckpointReader,
    CheckpointWriter,
    carry_files,
    open_checkpoint,
    parse_dtype,
    plan_like,
)
from dare_agg.derive import derive_key, seed_secret
from dare_agg.diagnose import diagnose_deltas
from dare_agg.errors import (
    BaseMismatchError,
    ConfigError,
    LayoutError,
    MergeError,
    NonFiniteError,
)
from dare_agg.layout import FloatVector, Layout, compile_patterns, layout_of, matches
from dare_agg.mask import Mask, parse_drop_rate
from dare_agg.merge.adapter import CONFIG_NAME, adapter_base, adapter_source, is_adapter
from dare_agg.merge.engine import prepare_merge, run_tiles
from dare_agg.merge.identity import content_order, sketch
from dare_agg.merge.methods import find_method
from dare_agg.merge.norms import norm_ratios
from dare_agg.merge.recipe import MERGEKIT_NORMS, ModelInput, Recipe
from dare_agg.merge.sources import (
    CachedSource,
    DeltaSource,
    DifferenceSource,
    MaskedSource,
    ScaledSource,
    SparseSource,
    TrimmedSource,
    array_source,
    take,
)
from dare_agg.merge.task import Scratch, is_sparse
from dare_agg.merge.thresholds import kth_smallest

# Elements of a tile, and at most of all models' tiles together: memory does not grow with them.
TILE, _IN_ALL, _SMALLEST_TILE = 1 << 17, 1 << 20, 1 << 14
# The label of mask keys that follow from a seed and a delta's contents.
UPDATE_MASK = "update file mask"
# Listing survivors has a cost for each tile, so sparse merges take larger ones: so many survivors
# of each model, which are two whole steps of its mask, in a tile that stays in a cache.
_LISTED, _LISTED_IN_ALL, _LARGEST_TILE = 1 << 15, 1 << 19, 1 << 19
# Elements of a model, and of all of them, looked at for the range check, in runs of neighbours.
_CHECKED, _CHECKED_IN_ALL, _RUN = 1 << 16, 1 << 19, 256


@dataclass(frozen=True)
class MergeReport:
    """What an offline merge did. ``models`` are in the order in which they were added."""

    out: str
    method: str
    parameters: int
    tensors: int
    excluded: tuple[str, ...]
    models: tuple[dict[str, Any], ...]
    carried: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Opened:
    """A model that has been opened and found to fit the base."""

    given: ModelInput
    source: DeltaSource
    kind: str
    checkpoint: Checkpoint | None = None
    number: int = 0


def merge_offline(
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool = False,
    tile: int | None = None,
    threads: int = 1,
    check: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Merge as the recipe says and write ``out`` (a ``.safetensors`` file or a folder).

    ``tile`` and ``threads`` change speed and memory, never a bit of the result. ``check``
    looks for non-finite values first. Raises a `DareError` before any work where anything
    does not fit; ``out`` appears complete or not at all.
    """
    base = open_checkpoint(recipe.base)
    layout = base.layout(recipe.exclude)
    if not layout.size:
        raise MergeError(f"{recipe.base} has no parameter left to merge; exclude less")
    cached = CachedSource(base.reader(layout))
    opened = [
        replace(open_model(model, base, layout, cached, recipe.exclude), number=number)
        for number, model in enumerate(recipe.models)
    ]
    plans = plan_like(base, out, layout, parse_dtype(recipe.dtype) if recipe.dtype else None)
    with CheckpointWriter(out, plans, {"format": "pt"}, overwrite) as writer:
        if check:
            for checkpoint in [base, *(m.checkpoint for m in opened if m.checkpoint)]:
                checkpoint.check_finite(layout)
        warnings = range_warnings(opened, recipe)
        ordered = sparsified(opened, recipe, layout)
        names = [sketch(m.source) for m in ordered]
        order = content_order(
            [m.source for m in ordered],
            names,
            [(m.given.weight or 0.0, m.given.seed or 0, m.number) for m in ordered],
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
            options=_options(recipe, ordered),
            tile=used,
            base=cached,
            statistics=[
                _statistics(m.given.statistics, find_method(recipe.method).statistics, layout)
                for m in ordered
                if m.given.statistics
            ],
        )

        def work(lo: int, hi: int, scratch: Scratch) -> None:
            merged = scratch.get("merged", hi - lo)
            # Read first: the survivors' base values are then picked from this tile.
            cached.tile(lo, hi)
            kernel(lo, hi, merged, scratch)
            merged += cached.tile(lo, hi)
            for entry, first, last in layout.pieces(lo, hi):
                at = entry.offset - lo
                writer.write(entry.name, first, merged[at + first : at + last])
            if on_progress is not None:
                on_progress(hi, layout.size)

        run_tiles(task, work, threads)
        for name in (*layout.excluded, *layout.buffers):
            writer.write_raw(name, 0, base.raw(name))
        models = tuple(_described(m, names[i]) for m, i in zip(ordered, order, strict=True))
        carried: tuple[str, ...] = ()
        if not writer.single:
            if base.folder is not None:
                carried = carry_files(base.folder, writer.folder)
            card = model_card(recipe.as_dict(), models, layout, find_method(recipe.method))
            (writer.folder / "README.md").write_text(card, encoding="utf-8")
    return MergeReport(
        str(out), find_method(recipe.method).name, layout.size, len(layout.entries),
        layout.excluded, models, carried, tuple(warnings),
    )  # fmt: skip


def _tile(sources: list[DeltaSource]) -> int:
    if not all(is_sparse(source) for source in sources):
        return max(_SMALLEST_TILE, min(TILE, _IN_ALL // len(sources)))
    share = max(s.survivors / s.size for s in sources if isinstance(s, SparseSource))
    listed = min(_LISTED, _LISTED_IN_ALL // len(sources))
    return max(TILE, min(_LARGEST_TILE, round(listed / share)))


def open_model(
    given: ModelInput,
    base: Checkpoint,
    layout: Layout,
    cached: CachedSource,
    exclude: list[str],
) -> _Opened:
    """Open a checkpoint, an adapter folder or an update file as a delta over the base."""
    path = given.path
    if path.suffix == ".dare":
        return _Opened(given, _open_update(path, base, layout), "update")
    if is_adapter(path):
        named = adapter_base(path)
        own = base.path.name.removesuffix(".safetensors")
        source = adapter_source(path, layout, cached)
        if named and Path(named).is_absolute() and Path(named).exists() and base.folder:
            other = open_checkpoint(named)
            if other.path.resolve() != base.path.resolve() and other.shapes != base.shapes:
                raise BaseMismatchError(
                    f"{path} was trained on {named}, BASE is {own}; give that as BASE"
                )
        return _Opened(given, source, "adapter")
    checkpoint = _with_names_of(open_checkpoint(path), layout)
    patterns = compile_patterns(exclude)
    strangers = [
        name
        for name, info in checkpoint.tensors.items()
        if info.is_float and name not in base.tensors and not matches(name, patterns)
    ]
    if strangers:
        raise LayoutError(
            f"{path} has tensor {strangers[0]!r} that BASE lacks ({len(strangers)} in all); if "
            f"it is a task's own head, leave it out: --exclude '{re.escape(strangers[0])}'"
        )
    reader = checkpoint.reader(layout)
    return _Opened(given, DifferenceSource(cached, reader), "checkpoint", checkpoint)


def _with_names_of(checkpoint: Checkpoint, layout: Layout) -> Checkpoint:
    """Strip or add the one prefix (such as "bert.") that task models put before the base's."""
    if not layout.entries or all(entry.name in checkpoint.tensors for entry in layout.entries):
        return checkpoint
    first = layout.entries[0].name
    for name in checkpoint.names:
        if name.endswith("." + first):
            prefix = name[: -len(first)]
            renamed = {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items()}
        elif first.endswith("." + name):
            prefix = first[: -len(name)]
            renamed = {prefix + n: t for n, t in checkpoint.tensors.items()}
        else:
            continue
        if all(entry.name in renamed for entry in layout.entries):
            return replace(checkpoint, tensors=renamed)
    return checkpoint


def _open_update(path: Path, base: Checkpoint, layout: Layout) -> DeltaSource:
    from dare_agg.update_file import read_update_file

    update, header = read_update_file(path)
    if header.layout.fingerprint != layout.fingerprint:
        raise LayoutError(
            f"{path} covers other tensors ({header.layout.size} parameters) than BASE without "
            f"its excluded ones ({layout.size}); use the patterns the update was made with"
        )
    found = base.fingerprint(layout)
    if found != header.base:
        raise BaseMismatchError(
            f"{path} was made from base {header.base[:16]}, BASE is {found[:16]}; "
            "give the base it was made from"
        )
    return update


def sparsified(opened: list[_Opened], recipe: Recipe, layout: Layout) -> list[_Opened]:
    """Put the sparsifier over each delta; random masks get a key of the model's own."""
    rate = parse_drop_rate(recipe.drop_rate) if recipe.drop_rate is not None else None
    if rate is None or rate.numerator == 1:
        return opened
    for model in opened:
        if model.kind == "update":
            raise ConfigError(
                f"{model.given.path} is sparsified already; dropping twice destroys it: leave "
                "out --drop-rate, or give the checkpoint it was made from"
            )
    spans = [(entry.offset, entry.stop) for entry in layout.entries]
    if recipe.sparsifier == "magnitude":
        ranks = [
            (hi - lo) * (rate.numerator - rate.denominator) // rate.numerator for lo, hi in spans
        ]
        return [
            replace(m, source=TrimmedSource(m.source, spans, _limits(m.source, spans, ranks)))
            for m in opened
        ]
    keys = mask_keys(opened, recipe.seed)
    masked = [
        replace(
            m,
            source=MaskedSource(
                m.source,
                Mask(recipe.mask, layout.size, rate, key),
                rescale=recipe.sparsifier == "dare",
            ),
        )
        for m, key in zip(opened, keys, strict=True)
    ]
    if recipe.sparsifier in MERGEKIT_NORMS:
        norm = MERGEKIT_NORMS[recipe.sparsifier]
        masked = [
            replace(
                m,
                source=ScaledSource(m.source, spans, norm_ratios(o.source, m.source, spans, norm)),
            )
            for o, m in zip(opened, masked, strict=True)
        ]
    return masked


def _limits(source: DeltaSource, spans: list[tuple[int, int]], ranks: list[int]) -> FloatVector:
    return kth_smallest(source, spans, ranks, TILE)


def mask_keys(opened: list[_Opened], seed: int) -> list[bytes]:
    """A mask key for each model, from its own seed or ``seed``, and its content.

    It is the key that ``dare-agg diff`` with that seed uses, so a merge of update files (in
    f32) equals that of the models. Models of equal content and seed get different keys,
    numbered in their order by weight.
    """
    seeds = [seed if m.given.seed is None else m.given.seed for m in opened]
    names = list(zip(seeds, (sketch(m.source) for m in opened), strict=True))
    keys = []
    for number, (own, content) in enumerate(names):
        twins = sorted(
            (opened[i].given.weight or 0.0, i)
            for i, other in enumerate(names)
            if other == (own, content)
        )
        twin = [i for _, i in twins].index(number)
        key = derive_key(seed_secret(own), UPDATE_MASK, content)
        keys.append(key if not twin else derive_key(key, "twin", twin))
    return keys


def tensor_weights(
    recipe: Recipe, ordered: list[_Opened], layout: Layout
) -> tuple[NDArray[np.float64] | None, float | NDArray[np.float64]]:
    """Weights and scaling as the engine takes them; rules make them (…, tensors)."""
    weights: NDArray[np.float64] | None = None
    if all(m.given.weight is not None for m in ordered):
        weights = np.array([m.given.weight for m in ordered], np.float64)
    if not recipe.rules:
        return weights, recipe.scaling
    count = len(ordered)
    if weights is None:
        mean = find_method(recipe.method).mean
        weights = np.full(count, 1 / count if mean else 1.0)
    table = np.tile(weights[:, None], (1, len(layout.entries)))
    scaling = np.full(len(layout.entries), recipe.scaling)
    for rule in recipe.rules:
        hits = [i for i, e in enumerate(layout.entries) if re.search(rule.match, e.name)]
        if not hits:
            raise ConfigError(f"rule {rule.match!r} matches no tensor; see the model's names")
        if rule.scaling is not None:
            scaling[hits] = rule.scaling
        if rule.weights is not None:
            for row, model in enumerate(ordered):
                table[row, hits] = rule.weights[model.number]
    return table, scaling


def _options(recipe: Recipe, ordered: list[_Opened]) -> dict[str, Any]:
    """The recipe's options with per-model values put in the models' order."""
    options = dict(recipe.options)
    for name, value in options.items():
        if isinstance(value, list | tuple) and len(value) == len(ordered):
            options[name] = [value[m.number] for m in ordered]
    own = sorted({name for m in ordered for name in m.given.options})
    for name in own:
        option = find_method(recipe.method).options[name]
        if not option.per_model:
            raise ConfigError(f"option {name} is for all models; give it once, not for a model")
        common = options.get(name, option.default)
        common = common if isinstance(common, list) else [common] * len(ordered)
        options[name] = [m.given.options.get(name, c) for m, c in zip(ordered, common, strict=True)]
        if any(v is None for v in options[name]):
            raise ConfigError(f"option {name} is given for some models only; give it for all")
    return options


def _statistics(path: Path, kind: str | None, layout: Layout) -> Mapping[str, NDArray[Any]]:
    """Open a statistics file under the base's names, whatever prefix its own have."""
    checkpoint = open_checkpoint(path)
    found = checkpoint.metadata.get("kind", kind)
    if found != kind:
        raise MergeError(
            f"{path} holds {found} statistics, {kind} is needed; make it with dare-agg statistics "
            f"--kind {kind}"
        )
    names = {entry.name for entry in layout.entries}
    checkpoint = replace(checkpoint, tensors=_renamed(checkpoint.tensors, names))
    arrays = {}
    for name, info in checkpoint.tensors.items():
        stored = checkpoint.raw(name)
        arrays[name] = stored.reshape(info.shape) if info.dtype == "F32" else checkpoint.array(name)
    return arrays


def _renamed(given: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """Strip or add the one prefix that gives most of ``given`` a name among ``names``."""
    best, most = dict(given), len(names & set(given))
    prefixes = {
        (long[: -len(short)], strip)
        for ours, strip in ((sorted(given), True), (sorted(names), False))
        for long in ours
        for short in [long.partition(".")[2]]
        if short
    }
    for prefix, strip in sorted(prefixes):
        changed = {n.removeprefix(prefix) if strip else prefix + n: v for n, v in given.items()}
        if len(changed) == len(given) and len(names & set(changed)) > most:
            best, most = changed, len(names & set(changed))
    return best


def range_warnings(opened: list[_Opened], recipe: Recipe) -> list[str]:
    """The paper's check of the deltas' range, on an even sample of up to 2^16 elements.

    Updates are left out: they hold what survived, rescaled, and were checked when opened.
    Raises `NonFiniteError` where the sample is not finite (adapters).
    """
    dense = [m for m in opened if m.kind != "update"]
    if not dense:
        return []
    size = opened[0].source.size
    count = min(size, _CHECKED, max(_RUN, _CHECKED_IN_ALL // len(dense)))
    starts = (
        np.arange(-(-count // _RUN), dtype=np.int64)
        * (size - min(_RUN, size))
        // max(1, -(-count // _RUN) - 1)
    )
    # In a small model the runs overlap; positions must ascend.
    blocks = np.unique(starts[:, None] + np.arange(min(_RUN, size)))
    samples = []
    for model in dense:
        picked = take(model.source, blocks)
        if not np.isfinite(picked).all():
            raise NonFiniteError(f"{model.given.path}: its delta is not finite; train it again")
        samples.append(array_source(picked))
    names = [str(model.given.path) for model in dense]
    found = diagnose_deltas(layout_of({"sample": (blocks.size,)}), samples, names=names)
    warnings = list(found.warnings)
    if any("nearer to each other" in warning for warning in warnings):
        warnings += filter(None, [bases_named_by([model.given.path for model in dense])])
    if recipe.drop_rate is None:
        return [w for w in warnings if "unsafe" not in w]
    return warnings


def bases_named_by(paths: Sequence[Path]) -> str:
    """Say which bases the models' own files name; empty where they name none."""
    named: dict[str, list[str]] = {}
    for path in paths:
        for base in _named_bases(path):
            named.setdefault(base, []).append(path.name)
    told = [f"{base!r} ({', '.join(models)})" for base, models in sorted(named.items())]
    return f"the models' own files name as base: {'; '.join(told)}" if told else ""


def _named_bases(path: Path) -> set[str]:
    found: set[str] = set()
    for file, keys in (
        (CONFIG_NAME, ("base_model_name_or_path",)),
        ("config.json", ("base_model", "_name_or_path")),
    ):
        with contextlib.suppress(OSError, ValueError):
            values = json.loads((path / file).read_text(encoding="utf-8"))
            found |= {
                str(values[key]) for key in keys if isinstance(values, dict) and values.get(key)
            }
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        # The YAML head of a model card.
        _, head, _ = (path / "README.md").read_text(encoding="utf-8").split("---", 2)
        card = yaml.safe_load(head)
        bases = card.get("base_model") if isinstance(card, dict) else None
        found |= {str(base) for base in ([bases] if isinstance(bases, str) else bases or ())}
    return {base for base in found if base not in (str(path), path.name)}


def _described(model: _Opened, name: bytes) -> dict[str, Any]:
    described: dict[str, Any] = {"path": str(model.given.path), "kind": model.kind}
    if model.given.weight is not None:
        described["weight"] = model.given.weight
    if model.given.seed is not None:
        described["seed"] = model.given.seed
    described["content"] = name.hex()[:16]
    return described


def open_reader(path: Path, layout: Layout) -> CheckpointReader:
    """Open a model's parameters over a base's layout, whatever prefix its names have."""
    return _with_names_of(open_checkpoint(path), layout).reader(layout)
