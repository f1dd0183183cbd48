"""An adapter's folder: its configuration, and its tensors mapped, not loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from dare_agg.checkpoint import Checkpoint, open_checkpoint
from dare_agg.errors import CheckpointError
from dare_agg.files.json_text import read_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_MLX = "adapters.safetensors"
# What a folder of a whole model holds: an adapter inside it is beside the matter.
_WHOLE = ("config.json", "model.safetensors", "model.safetensors.index.json")
_MOST_ADAPTERS = 1000


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk. ``kind`` is PEFT's ``peft_type``, or ``MLX``."""

    path: Path
    config: Mapping[str, Any]
    tensors: Checkpoint
    kind: str


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter: its folder, a folder of such, or the file in one."""
    return _holds(path) or _holds(path.parent, path.name) or bool(_inside(path))


def adapter_base(path: Path) -> str | None:
    """Return the base model's name in the adapter's configuration."""
    named = _config(_folder(path)).get("base_model_name_or_path")
    return named if isinstance(named, str) else None


def open_adapter(path: Path) -> AdapterFolder:
    """Open an adapter; raises `CheckpointError` where it cannot be read, and how to mend it."""
    folder = _folder(path)
    config = _config(folder)
    file = folder / WEIGHTS_NAME
    kind = config.get("peft_type")
    if not kind and (folder / _MLX).is_file():
        file, kind = folder / _MLX, "MLX"
    if not kind:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} names no peft_type: it is no adapter of PEFT's; merge it with "
            "the tool that made it and give the merged model"
        )
    if not file.is_file() and (folder / _PICKLED).is_file():
        code = (
            "import sys, torch; from safetensors.torch import save_file; save_file({k: v.clone() "
            "for k, v in torch.load(sys.argv[1], weights_only=True).items()}, sys.argv[2])"
        )
        raise CheckpointError(
            f"{folder} has only pickled weights ({_PICKLED}), which are not read: pickle runs "
            f'code. Convert them: python -c "{code}" {quote(str(folder / _PICKLED))} '
            f"{quote(str(file))}"
        )
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS_NAME}; save the adapter again")
    return AdapterFolder(folder, config, open_checkpoint(file), str(kind))


def _holds(folder: Path, file: str | None = None) -> bool:
    return (folder / CONFIG_NAME).is_file() and file in (None, WEIGHTS_NAME, _PICKLED, _MLX)


def _inside(path: Path) -> list[Path]:
    """The adapters in a folder of several, as PEFT and trainers save them."""
    if not path.is_dir() or any((path / name).is_file() for name in _WHOLE):
        return []
    found = []
    for number, inner in enumerate(path.iterdir()):
        if number >= _MOST_ADAPTERS:
            break
        if _holds(inner):
            found.append(inner)
    return sorted(found)


def _folder(path: Path) -> Path:
    if _holds(path):
        return path
    if _holds(path.parent, path.name):
        return path.parent
    found = _inside(path)
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(f"{path} has no {CONFIG_NAME}; give the adapter's own folder")
    raise CheckpointError(
        f"{path} holds {len(found)} adapters ({', '.join(f.name for f in found[:8])}): give one, "
        f"such as {found[-1]}"
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG_NAME)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG_NAME} is no JSON object")
    return config
