"""PEFT LoRA adapters as deltas: scaling·B·A, formed block by block.

Reference: arXiv 2106.09685; rsLoRA (2312.03732) scales by α/√r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint import open_checkpoint
from dare_agg.errors import CheckpointError, NonFiniteError
from dare_agg.files.json_text import read_json
from dare_agg.vectors.layout import Entry, FloatVector, Layout
from dare_agg.vectors.patterns import compile_patterns, matches
from dare_agg.vectors.sources import CachedSource

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BLOCK = 1 << 18
_MOST_ALPHA = 1e30


@dataclass(frozen=True)
class _Factors:
    """δ = scaling·B·A of one weight; ``transposed`` where the weight is stored (in, out)."""

    left: NDArray[np.float32]
    right: NDArray[np.float32]


class AdapterSource:
    """The delta of a LoRA adapter over a base's layout (a `DeltaSource`).

    Rows are multiplied in fixed blocks, so the values do not depend on the tiles asked for.
    """

    def __init__(
        self,
        layout: Layout,
        factors: Mapping[str, _Factors],
        whole: Mapping[str, NDArray[np.float32]],
        base: CachedSource,
    ) -> None:
        self._layout, self._factors, self._whole, self._base = layout, factors, whole, base
        self._last = local()

    @property
    def size(self) -> int:
        return self._layout.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        out[:] = 0
        for entry, first, last in self._layout.pieces(lo, hi):
            at = entry.offset - lo
            target = out[at + first : at + last]
            if entry.name in self._whole:
                base = np.empty(last - first, np.float32)
                self._base.source.read(entry.offset + first, entry.offset + last, base)
                np.subtract(self._whole[entry.name].reshape(-1)[first:last], base, out=target)
            elif entry.name in self._factors:
                self._product(entry, first, last, target)

    def _product(self, entry: Entry, first: int, last: int, out: FloatVector) -> None:
        factors, width = self._factors[entry.name], entry.shape[-1]
        rows = max(1, _BLOCK // width)
        done = first
        while done < last:
            block = done // (rows * width)
            if getattr(self._last, "key", None) != (entry.name, block):
                part = factors.left[block * rows : (block + 1) * rows]
                with np.errstate(invalid="ignore", over="ignore"):
                    values = (part @ factors.right).reshape(-1)
                _check_finite(values, entry.name)
                self._last.values = values
                self._last.key = (entry.name, block)
            start = block * rows * width
            stop = min(last, start + self._last.values.size)
            out[done - first : stop - first] = self._last.values[done - start : stop - start]
            done = stop


def is_adapter(path: Path) -> bool:
    """Whether a path is a PEFT adapter folder."""
    return (path / CONFIG_NAME).is_file()


def adapter_base(path: Path) -> str | None:
    """Return the base model's name in the adapter's configuration."""
    return _config(path).get("base_model_name_or_path")


def adapter_source(path: Path, layout: Layout, base: CachedSource) -> AdapterSource:
    """Open a LoRA adapter over ``layout``.

    Raises `CheckpointError` for another kind of adapter, a module the base does not have or
    shapes that do not fit.
    """
    config = _config(path)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise CheckpointError(
            f"{path} is a {kind} adapter; only LoRA has a delta B·A: merge it with peft first"
        )
    if not (path / WEIGHTS_NAME).is_file():
        raise CheckpointError(f"{path} has no {WEIGHTS_NAME}; save the adapter with safetensors")
    saved = open_checkpoint(path / WEIGHTS_NAME)
    left: dict[str, str] = {}
    whole: dict[str, NDArray[np.float32]] = {}
    factors: dict[str, _Factors] = {}
    for name in saved.names:
        plain = name.removeprefix(_PREFIX)
        module, _, last = plain.rpartition(".lora_")
        if last in ("A.weight", "B.weight"):
            if last == "A.weight":
                left[module] = name
        elif module:
            raise CheckpointError(
                f"{path}: {plain!r} is no Linear's A or B; embeddings and biases of adapters are "
                "not merged: merge it with peft first"
            )
        else:
            found = _entry_of(layout, plain, path)
            whole[found.name] = saved.array(name)
            _check_finite(whole[found.name], found.name)
            _fits(path, found, whole[found.name].shape)
    for module, name in left.items():
        other = name.replace(".lora_A.", ".lora_B.")
        if other not in saved.tensors:
            raise CheckpointError(f"{path}: {module!r} has lora_A but no lora_B")
        a, b = saved.array(name), saved.array(other)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.size:
            raise CheckpointError(
                f"{path}: A and B of {module!r} have shapes {a.shape} and {b.shape}, which cannot "
                "be multiplied: save the adapter again"
            )
        entry = _entry_of(layout, f"{module}.weight", path)
        scale = np.float32(_scaling(config, module, a.shape[0]))
        if config.get("fan_in_fan_out"):
            a, b = b.T, a.T
            left_factor, right_factor = b * scale, a
        else:
            left_factor, right_factor = b * scale, a
        _fits(path, entry, (left_factor.shape[0], right_factor.shape[1]))
        factors[entry.name] = _Factors(
            np.ascontiguousarray(left_factor), np.ascontiguousarray(right_factor)
        )
    if not factors and not whole:
        raise CheckpointError(f"{path} holds no LoRA weights")
    return AdapterSource(layout, factors, whole, base)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path / CONFIG_NAME)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path / CONFIG_NAME} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / CONFIG_NAME} is no JSON object")
    return config


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"alpha_pattern of an adapter is {patterns!r:.40}, no mapping")
    for pattern, value in patterns.items():
        if matches(module, compile_patterns([rf"^(.*\.)?({pattern})$"])):
            alpha = value
            break
    if (
        isinstance(alpha, bool)
        or not isinstance(alpha, int | float)
        or not abs(alpha) < _MOST_ALPHA
    ):
        raise CheckpointError(f"lora_alpha {alpha!r:.40} of an adapter is no number; set it in it")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _entry_of(layout: Layout, name: str, path: Path) -> Entry:
    """Find a weight of the adapter in the base, whose names may lack a prefix such as bert."""
    if name in layout:
        return layout[name]
    parts = name.split(".")
    for cut in range(1, len(parts)):
        if ".".join(parts[cut:]) in layout:
            return layout[".".join(parts[cut:])]
    ending = [entry for entry in layout.entries if entry.name.endswith("." + name)]
    if len(ending) == 1:
        return ending[0]
    raise CheckpointError(
        f"{path}: the base has no tensor {name!r} (or it is excluded); the adapter belongs to "
        "another model"
    )


def _check_finite(values: FloatVector, name: str) -> None:
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"the delta that an adapter makes of {name!r} is not finite: check how it was trained"
        )


def _fits(path: Path, entry: Entry, shape: tuple[int, ...]) -> None:
    if shape != entry.shape:
        raise CheckpointError(
            f"{path}: delta of {entry.name!r} has shape {shape}, the base has {entry.shape}; the "
            "adapter belongs to another model"
        )
