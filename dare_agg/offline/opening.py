"""Opening what a merge is given: checkpoints, adapters and updates as deltas over one base."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dare_agg.checkpoint import Checkpoint, open_checkpoint
from dare_agg.checkpoint.names import renamed
from dare_agg.errors import BaseMismatchError, CheckpointError, LayoutError
from dare_agg.offline.adapter import adapter_base, adapter_source, is_adapter
from dare_agg.offline.integers import check_same_integers
from dare_agg.offline.parameters import plain_parameter
from dare_agg.offline.recipe import ModelInput
from dare_agg.vectors.layout import Layout
from dare_agg.vectors.patterns import compile_patterns, matches
from dare_agg.vectors.sources import CachedSource, DeltaSource, DifferenceSource


@dataclass(frozen=True)
class OpenedModel:
    """A model that has been opened and found to fit the base."""

    given: ModelInput
    source: DeltaSource
    kind: str
    checkpoint: Checkpoint | None = None
    number: int = 0


def open_model(
    given: ModelInput,
    base: Checkpoint,
    layout: Layout,
    cached: CachedSource,
    exclude: list[str],
) -> OpenedModel:
    """Open a checkpoint, an adapter folder or an update file as a delta over the base.

    Raises `BaseMismatchError` for what was made from another base, `LayoutError` for tensors
    that the base lacks.
    """
    path = given.path
    if path.suffix == ".dare":
        return OpenedModel(given, _open_update(path, base, layout), "update")
    if is_adapter(path):
        named = adapter_base(path)
        own = base.path.name.removesuffix(".safetensors")
        source = adapter_source(path, layout, cached)
        if named and Path(named).is_absolute() and Path(named).exists() and base.folder:
            try:
                shapes = open_checkpoint(named).shapes
            except CheckpointError:
                # Quantised, pickled or damaged, it says nothing: BASE takes its place.
                shapes = base.shapes
            if shapes != base.shapes:
                raise BaseMismatchError(
                    f"{path} was trained on {named}, BASE is {own}; give that as BASE"
                )
        return OpenedModel(given, source, "adapter")
    checkpoint = open_checkpoint(path)
    under = renamed(checkpoint.tensors, layout.names)
    if under.keys() >= set(layout.names):
        checkpoint = replace(checkpoint, tensors=under)
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
    check_same_integers(base, checkpoint, patterns)
    reader = checkpoint.reader(layout)
    return OpenedModel(given, DifferenceSource(cached, reader), "checkpoint", checkpoint)


def _open_update(path: Path, base: Checkpoint, layout: Layout) -> DeltaSource:
    from dare_agg.codec.update_file import read_update_file

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


def described(model: OpenedModel, name: bytes) -> dict[str, Any]:
    """What a card says of one input: path, kind, weight, seed, content (16 hex digits)."""
    described: dict[str, Any] = {"path": str(model.given.path), "kind": model.kind}
    if model.given.weight is not None:
        described["weight"] = plain_parameter(model.given.weight)
    if model.given.seed is not None:
        described["seed"] = model.given.seed
    described["content"] = name.hex()[:16]
    return described
