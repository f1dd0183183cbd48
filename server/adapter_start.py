"""An adapter that a run goes on from: its tensors under a running model's names, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dare_agg.checkpoint import widen
from dare_agg.checkpoint.carried import HEAD_NAME
from dare_agg.errors import ConfigError
from dare_agg.offline.adapters.folder import AdapterFolder, open_adapter
from server.config import RunConfig

ENCODER = "encoder."
_ADAPTER = "default"
# What the run config and an adapter's own configuration call the same thing.
_SAME = {
    "r": "lora-rank", "lora_alpha": "lora-alpha", "use_rslora": "lora-rslora",
    "use_dora": "lora-dora", "bias": "lora-bias",
}  # fmt: skip


def read_adapter(path: Path, config: RunConfig) -> dict[str, NDArray[Any]]:
    """The state that an adapter of PEFT's is of a run of this config.

    Raises `ConfigError` for another kind of adapter, one of another base or other settings, and
    one whose configuration does not say its alpha; `CheckpointError` where it cannot be read.
    """
    folder = open_adapter(path)
    _check(folder, config)
    saved = folder.config.get("modules_to_save") or ()
    whole = tuple(str(name) for name in saved) if isinstance(saved, list) else ()
    found: dict[str, NDArray[Any]] = {}
    for name in folder.tensors.names:
        entry = folder.tensors.tensors[name]
        values = np.empty(int(np.prod(entry.shape)), np.float32)
        widen(folder.tensors.raw(name), entry.dtype, values)
        found[running_name(name, whole)] = values.reshape(entry.shape)
    # What this library exports of a model with a head has the head beside the adapter.
    head = folder.path.parent / HEAD_NAME
    if head.is_file():
        found = {f"{ENCODER}{name}": array for name, array in found.items()}
        found |= load_file(head)
    return found


def running_name(name: str, whole: tuple[str, ...] = ()) -> str:
    """A running model's name of a tensor in an adapter's file; ``whole`` are modules saved whole.

    >>> running_name("base_model.model.q.lora_A.weight")
    'base_model.model.q.lora_A.default.weight'
    >>> running_name("base_model.model.score.weight", ("score",))
    'base_model.model.score.modules_to_save.default.weight'
    """
    module, _, leaf = name.rpartition(".")
    if leaf.startswith("lora_"):  # a magnitude, an embedding's factor
        end = ".weight" if leaf == "lora_magnitude_vector" else ""
        return f"{name}.{_ADAPTER}{end}"
    if module.rpartition(".")[2].startswith("lora_"):
        return f"{module}.{_ADAPTER}.{leaf}"
    if any(module == w or module.endswith(f".{w}") for w in whole):
        return f"{module}.modules_to_save.{_ADAPTER}.{leaf}"
    return name


def _check(folder: AdapterFolder, config: RunConfig) -> None:
    path, own = folder.path, folder.config
    if folder.kind != "LORA":
        raise ConfigError(f"initial: {path} is an adapter of kind {folder.kind}; LORA is trained")
    if config.train != "lora":
        raise ConfigError(f"initial: {path} is an adapter, and train = {config.train}; set lora")
    if own.get("lora_alpha") is None:
        raise ConfigError(
            f"initial: {path} has no lora_alpha in its adapter_config.json, so what it means is "
            "unknown; write there the alpha that it was trained with"
        )
    base = own.get("base_model_name_or_path")
    if isinstance(base, str) and base and not _same_model(base, config.model):
        raise ConfigError(
            f"initial: {path} is an adapter of base {base!r}, the run's model is "
            f"{config.model!r}; give the run that model, or an adapter of its own"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if own.get(key):
            raise ConfigError(
                f"initial: {path} has a {key}; a run's adapters have one rank and alpha: merge it "
                "into the base first (dare-agg merge)"
            )
    run = config.model_dump(by_alias=True)
    for theirs, ours in _SAME.items():
        value = own.get(theirs, _usual(theirs))
        if value != run[ours]:
            raise ConfigError(
                f"initial: {path} has {theirs} = {value}, the run's {ours} is {run[ours]}; set "
                f"{ours} = {_written(value)}"
            )


def _usual(key: str) -> Any:
    usual: Mapping[str, Any] = {"use_rslora": False, "use_dora": False, "bias": "none"}
    return usual.get(key)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _same_model(one: str, other: str) -> bool:
    """Whether two words can mean one model: a hub's name and a folder of that name can."""
    return one == other or Path(one).name == Path(other).name
