"""Models put together of layers of others: depth-upscaled ones, and slices of a merge.

No tensor is copied: the pieces' files stay mapped, their layers are counted anew. What comes
before the layers is the first piece's, what comes after them the last one's. Only where an adapter
is added to a piece is a model of the two written first, and removed at the end.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dare_agg.checkpoint import Checkpoint, TensorInfo, TensorPlan, open_checkpoint
from dare_agg.checkpoint.config import config_of
from dare_agg.checkpoint.stated_dtype import CONFIG
from dare_agg.checkpoint.writer import folder_beside
from dare_agg.errors import ConfigError
from dare_agg.files.json_text import read_json
from dare_agg.offline.differences import DEPTH
from dare_agg.offline.parameters import depth_of_stacks, is_before, layer_of
from dare_agg.offline.recipe import Piece, Recipe
from dare_agg.offline.rows import BASE

# Makes a model of a base and an adapter: base, adapter, where to.
Make = Callable[[Path, Path, Path], None]
# A model and its layers [first, stop), None for all.
Part = tuple[Checkpoint, tuple[int, int] | None]


@contextmanager
def stacked(recipe: Recipe, out: Path, make: Make) -> Iterator[dict[int, Checkpoint]]:
    """Give the models of a recipe that have pieces, by number, `BASE` for the base's.

    Raises `ConfigError` for layers that a piece does not have.
    """
    lists = {BASE: recipe.base_pieces} | {n: m.pieces for n, m in enumerate(recipe.models)}
    lists = {number: pieces for number, pieces in lists.items() if pieces}
    for model in recipe.models if BASE in lists else ():
        if model.path.suffix == ".dare":
            raise ConfigError(f"{model} was made for a base that is stored, not for one of pieces")
    if not lists:
        yield {}
        return
    with folder_beside(out, "pieces") as place:
        opened: dict[tuple[Path, Path | None], Checkpoint] = {}
        for piece in [piece for pieces in lists.values() for piece in pieces]:
            key = piece.path, piece.adapter
            if key not in opened and piece.adapter is not None:
                made = place / str(len(opened))
                make(piece.path, piece.adapter, made)
                opened[key] = open_checkpoint(made)
            elif key not in opened:
                opened[key] = open_checkpoint(piece.path)
        donors = {BASE: recipe.base} | {n: m.path for n, m in enumerate(recipe.models)}
        yield {
            number: put_together(
                [_part(opened[p.path, p.adapter], p) for p in pieces], donors[number]
            )
            for number, pieces in lists.items()
        }


def _part(model: Checkpoint, piece: Piece) -> Part:
    if piece.layers is None:
        return model, None
    depths = depth_of_stacks(model.names)
    if len(depths) != 1:
        raise ConfigError(
            f"{piece.path} has {len(depths)} stacks of layers ({', '.join(sorted(depths)[:3])}); "
            "pieces are of models that have one"
        )
    depth = max(depths.values())
    if piece.layers[1] > depth:
        raise ConfigError(f"{piece.path} has {depth} layers, {list(piece.layers)} are asked for")
    return model, piece.layers


def put_together(parts: Sequence[Part], path: Path) -> Checkpoint:
    """Return one checkpoint of runs of layers [first, stop) of others; it counts as ``path``'s.

    Raises `ConfigError` where they call their layers differently.
    """
    if parts[0][1] is None:
        return replace(parts[0][0], path=path)
    tensors: dict[str, TensorInfo] = {}
    called = {name for model, _ in parts for name in depth_of_stacks(model.names)}
    if len(called) > 1:
        raise ConfigError(
            f"{path}: the pieces' layers are called {' and '.join(sorted(called)[:2])}; pieces are "
            "of models of one architecture"
        )
    offset = 0
    for number, (model, span) in enumerate(parts):
        first, stop = span or (0, 0)
        for name, info in model.tensors.items():
            at = layer_of(name)
            if at is None:
                taken, new = number == (0 if is_before(name) else len(parts) - 1), name
            else:
                taken = first <= at[1] < stop
                new = f"{at[0]}{at[1] - first + offset}{at[2]}"
            if taken:
                tensors[new] = replace(info, name=new)
        offset += stop - first
    return Checkpoint(path, tensors, parts[0][0].metadata)


def layered(model: Checkpoint) -> set[str]:
    """The tensors that lie in layers: equal ones are a layer that was taken twice, not tied."""
    return {name for name in model.tensors if layer_of(name) is not None}


def own_shards(plans: Mapping[str, TensorPlan], model: Checkpoint) -> dict[str, TensorPlan]:
    """Plans with one shard for each file of the pieces, numbered: their names may be alike."""
    files = list(dict.fromkeys(info.file for info in model.tensors.values()))
    if len(files) == 1:
        return dict(plans)
    names = {f: f"model-{n:05d}-of-{len(files):05d}.safetensors" for n, f in enumerate(files, 1)}
    return {
        name: replace(plan, shard=names[model.tensors[name].file]) for name, plan in plans.items()
    }


def stored_dtype(pieces: Sequence[Piece]) -> str | None:
    """The dtype of a model to which an adapter is added here in full precision; None for others."""
    if not any(piece.adapter for piece in pieces):
        return None
    tensors = open_checkpoint(pieces[0].path).tensors.values()
    found = Counter(info.dtype for info in tensors if info.is_float)
    return found.most_common(1)[0][0]


def state_layers(folder: Path, pieces: Sequence[Piece]) -> None:
    """Make ``config.json`` say how many layers there are, and of what type each is."""
    if pieces[0].layers is None:
        return
    file = folder / CONFIG
    try:
        config = read_json(file)
    except (OSError, ValueError):
        return
    if isinstance(config, dict):
        others = [_config(piece.path) for piece in pieces]
        _state(config, others, [piece.layers or (0, 0) for piece in pieces])
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")


def _config(path: Path) -> dict[str, Any]:
    return config_of(open_checkpoint(path))


def _state(
    config: dict[str, Any],
    others: Sequence[Mapping[str, Any]],
    spans: Sequence[tuple[int, int]],
) -> None:
    key = next((key for key in DEPTH if isinstance(config.get(key), int)), None)
    for inner in config.values():
        if isinstance(inner, dict) and key is None:
            _state(inner, others, spans)
    if key is None:
        return
    before = config[key]
    for name, value in config.items():
        # One entry for each layer: layer_types, and the like.
        if isinstance(value, list) and len(value) == before:
            lists = [other.get(name, value) for other in others]
            config[name] = [
                entry for one, span in zip(lists, spans, strict=True) for entry in one[slice(*span)]
            ]
    config[key] = sum(stop - first for first, stop in spans)
