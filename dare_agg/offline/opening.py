"""Opening what a merge is given: checkpoints, adapters and updates as deltas over one base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dare_agg.checkpoint import Checkpoint, open_checkpoint
from dare_agg.codec.directions import Directions
from dare_agg.errors import BaseMismatchError, CheckpointError, ConfigError, LayoutError
from dare_agg.offline.adapters.folder import adapter_base
from dare_agg.offline.adapters.source import AdapterSource, adapter_source
from dare_agg.offline.base import UPDATE, OpenedBase
from dare_agg.offline.integers import check_integers_known, check_same_integers
from dare_agg.offline.parameters import plain_parameter
from dare_agg.offline.recipe import ModelInput
from dare_agg.vectors.layout import Layout
from dare_agg.vectors.patterns import compile_patterns
from dare_agg.vectors.sources import CachedSource, DeltaSource, DifferenceSource, SumSource


@dataclass(frozen=True)
class OpenedModel:
    """A model that has been opened and found to fit the base."""

    given: ModelInput
    source: DeltaSource
    kind: str
    checkpoint: Checkpoint | None = None
    number: int = 0
    warnings: tuple[str, ...] = ()
    directions: Directions | None = None


def open_models(
    models: Sequence[ModelInput], base: OpenedBase, cached: CachedSource, exclude: Sequence[str]
) -> list[OpenedModel]:
    """Open checkpoints, adapter folders and update files as deltas over the base.

    Raises `BaseMismatchError` for what was made from another base, `LayoutError` for tensors
    that do not fit.
    """
    return [
        _open_model(model, number, base, cached, exclude) for number, model in enumerate(models)
    ]


def _open_model(
    given: ModelInput, number: int, base: OpenedBase, cached: CachedSource, exclude: Sequence[str]
) -> OpenedModel:
    path, layout = given.path, base.layout
    if number in base.fits:
        fit = base.fits[number]
        checkpoint = replace(fit.model, tensors=fit.tensors)
        patterns = compile_patterns(exclude)
        check_integers_known(fit.model, {info.name for info in fit.tensors.values()}, patterns)
        check_same_integers(base.checkpoint, checkpoint, patterns)
        tuned = checkpoint.reader(layout)
        if given.adapter is None:
            source = DifferenceSource(cached, tuned)
            return OpenedModel(given, source, "checkpoint", checkpoint, number)
        added = _added(given, given.adapter, checkpoint, base, exclude)
        source = DifferenceSource(cached, SumSource(tuned, added))
        return OpenedModel(
            given, source, "checkpoint with adapter", checkpoint, number, added.warnings
        )
    if given.adapter is not None:
        raise ConfigError(
            f"{path} is no whole model, to which {given.adapter} could be added; give a "
            "checkpoint before the +"
        )
    if path.suffix == UPDATE:
        update, directions = _open_update(path, base.checkpoint, layout)
        return OpenedModel(given, update, "update", None, number, directions=directions)
    adapter = adapter_source(path, base, cached, exclude)
    _check_trained_on(path, base.checkpoint, "BASE")
    return OpenedModel(given, adapter, "adapter", None, number, adapter.warnings)


def _added(
    given: ModelInput, adapter: Path, model: Checkpoint, base: OpenedBase, exclude: Sequence[str]
) -> AdapterSource:
    """What an adapter adds to ``model``, a checkpoint under BASE's names."""
    if base.aligned:
        raise ConfigError(
            f"{adapter} was trained on the tokens of {given.path}, OUT has others; make a model of "
            f"the two first and give that: dare-agg merge {given.path} {adapter} -o MODEL"
        )
    ground = replace(base, checkpoint=model, fits={})
    source = adapter_source(adapter, ground, CachedSource(model.reader(base.layout)), exclude)
    _check_trained_on(adapter, model, "the model before the +")
    return source


def _check_trained_on(adapter: Path, base: Checkpoint, place: str) -> None:
    """Raise `BaseMismatchError` where the model that an adapter names has other shapes."""
    named = adapter_base(adapter)
    if not named or not Path(named).is_absolute() or not Path(named).exists() or not base.folder:
        return
    try:
        shapes = open_checkpoint(named).shapes
    except CheckpointError:
        # Quantised, pickled or damaged, it says nothing: BASE takes its place.
        return
    if shapes not in (base.shapes, open_checkpoint(base.path).shapes):
        raise BaseMismatchError(
            f"{adapter} was trained on {named}, {place} is "
            f"{base.path.name.removesuffix('.safetensors')}; give that"
        )


def _open_update(
    path: Path, base: Checkpoint, layout: Layout
) -> tuple[DeltaSource, Directions | None]:
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
    return update, header.carried


def described(given: ModelInput, kind: str, name: bytes) -> dict[str, Any]:
    """What a card says of one input: path, kind, weight, seed, content (16 hex digits)."""
    described: dict[str, Any] = {"path": str(given.path)}
    if given.adapter is not None:
        described["adapter"] = str(given.adapter)
    described["kind"] = kind
    if given.weight is not None:
        described["weight"] = plain_parameter(given.weight)
    if given.seed is not None:
        described["seed"] = given.seed
    described["content"] = name.hex()[:16]
    return described
