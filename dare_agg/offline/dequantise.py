"""A quantised model as one of plain numbers, where that needs no GPU: FP8 and GGUF.

FP8 is read tensor by tensor and keeps the names and shards of its files; GGUF goes through
transformers, which knows its names. What was rounded away stays away: the model that the codes
were made from is the better base wherever it can be had.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dare_agg.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Left,
    TensorPlan,
    carry_files,
    open_tensors,
    parse_dtype,
    state_dtype,
)
from dare_agg.checkpoint.carried import CARD
from dare_agg.checkpoint.declared import Declared, declared_by, without_quantisation
from dare_agg.checkpoint.fp8 import Fp8Weights, dequantised, fp8_weights
from dare_agg.checkpoint.hub import located
from dare_agg.checkpoint.quantised import GGUF_SUFFIX, QuantisedError, check_not_quantised
from dare_agg.checkpoint.reader import WEIGHTS_NAME
from dare_agg.checkpoint.writer import check_target
from dare_agg.errors import CheckpointError, ConfigError
from dare_agg.files.atomic import folder_draft
from dare_agg.files.json_text import read_json
from dare_agg.offline.gguf import folder_from_gguf

_CONFIG = "config.json"
_DTYPES = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Dequantised:
    """What was made: the kind that it was, how many tensors were codes, their dtype now."""

    out: str
    kind: str
    tensors: int
    dtype: str
    left: tuple[Left, ...] = ()


def dequantise(
    given: Path,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    carry_code: bool = False,
) -> Dequantised:
    """Write a quantised model (a folder, a file, a hub's name) in full precision.

    ``dtype`` is that of the weights that were codes: by default what ``config.json`` states,
    else bfloat16, and float32 for GGUF. Raises `QuantisedError` for codes of another kind, and
    `CheckpointError` for a model that has none.
    """
    where = located(given)
    if dtype is not None:
        parse_dtype(dtype)
    gguf = _gguf_file(where)
    if gguf is not None:
        return _from_gguf(gguf, out, dtype or "float32", overwrite)
    model = open_tensors(where)
    weights = fp8_weights(model)
    if weights is None:
        check_not_quantised(model.path, model.tensors)
        raise CheckpointError(f"{given} is not quantised; merge it as it is")
    declared = declared_by(where) if where.is_dir() else None
    bare = [name for name, scale in weights.scales.items() if scale is None]
    if bare and declared is not None:
        raise QuantisedError(
            f"{where}: {declared.file} says that it is quantised ({declared.kind}), and no scale "
            f"stands beside the codes {bare[0]!r}; download it again, or give the full-precision "
            "model that it was made from"
        )
    word = dtype or _stated(where) or "bfloat16"
    left = _write(model, weights, declared, out, parse_dtype(word), overwrite, carry_code)
    return Dequantised(str(out), "FP8", len(weights.scales), word, left)


def _write(
    model: Checkpoint, weights: Fp8Weights, declared: Declared | None, out: Path, dtype: str,
    overwrite: bool, code: bool,
) -> tuple[Left, ...]:  # fmt: skip
    sharded = len(model.files) > 1 and out.suffix != ".safetensors"
    plans = {
        name: TensorPlan(
            dtype if name in weights.scales else info.dtype,
            info.shape,
            info.file.name if sharded else WEIGHTS_NAME,
        )
        for name, info in model.tensors.items()
        if name not in weights.dropped
    }
    block = _block_of(declared)
    with CheckpointWriter(out, plans, {"format": "pt"}, overwrite) as writer:
        for name in plans:
            if name not in weights.scales:
                writer.write_raw(name, 0, model.raw(name))
                continue
            for first, values in dequantised(model, name, weights.scales[name], block):
                writer.write(name, first, values)
            model.release()
        if writer.single or model.folder is None:
            return ()
        carried = carry_files(model.folder, writer.folder, code=code, skip=(CARD, *model.weights))
        config = _values(writer.folder / _CONFIG)
        if config:
            text = json.dumps(without_quantisation(config), indent=2, ensure_ascii=False)
            (writer.folder / _CONFIG).write_text(text + "\n", encoding="utf-8")
        state_dtype(writer.folder, plans)
        return carried.left


def _gguf_file(where: Path) -> Path | None:
    """The GGUF file that is given, alone in a folder without safetensors too."""
    if where.is_file():
        return where if where.suffix == GGUF_SUFFIX else None
    if not where.is_dir() or any(where.glob("*.safetensors")):
        return None
    found = sorted(where.glob(f"*{GGUF_SUFFIX}"))
    if len(found) > 1:
        raise ConfigError(f"{where} has {len(found)} GGUF files; give one, such as {found[-1]}")
    return found[0] if found else None


def _from_gguf(file: Path, out: Path, dtype: str, overwrite: bool) -> Dequantised:
    if out.suffix == ".safetensors":
        raise ConfigError(f"{out} is a file; a GGUF file becomes a folder: name one")
    check_target(out, {}, overwrite=overwrite)
    with folder_draft(out) as draft:
        folder_from_gguf(file, draft, dtype)
        tensors = len(open_tensors(draft).tensors)
    return Dequantised(str(out), "GGUF", tensors, dtype)


def _stated(where: Path) -> str | None:
    """The dtype that a folder's configuration states for its weights."""
    config = _values(where / _CONFIG) if where.is_dir() else {}
    for part in (config, config.get("text_config")):
        for key in _DTYPES:
            word = str(part.get(key, "")).removeprefix("torch.") if isinstance(part, dict) else ""
            with contextlib.suppress(ConfigError):
                if word:
                    parse_dtype(word)
                    return word
    return None


def _block_of(declared: Declared | None) -> tuple[int, int] | None:
    size = declared.settings.get("weight_block_size") if declared is not None else None
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return None


def _values(file: Path) -> Mapping[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        values = read_json(file)
        if isinstance(values, dict):
            return values
    return {}
