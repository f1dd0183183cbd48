"""Quantised checkpoints are told from others, by what their files declare and by their tensors.

Their weights are codes (integers, FP8, packed nibbles) beside scales. Deltas of codes mean
nothing, and codes left as they are under other scales are another model: so `open_checkpoint`
refuses them, wherever a model is taken, and says what helps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dare_agg.errors import CheckpointError
from dare_agg.files.json_text import read_settings

GGUF_SUFFIX = ".gguf"
# Files that a quantiser leaves beside the weights, and what it is where they do not say.
_BESIDE = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quanto_qmap.json": "quanto",
    "quantization_map.json": "quanto",
}
# How users write what `quant_method` says in one word.
_SPELLING = {
    "gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "bitsandbytes_4bit":
    "bitsandbytes 4 bit", "bitsandbytes_8bit": "bitsandbytes 8 bit", "fp8": "FP8", "fbgemm_fp8":
    "FP8 (fbgemm)", "hqq": "HQQ", "eetq": "EETQ", "mxfp4": "MXFP4", "nvfp4": "NVFP4", "gguf":
    "GGUF", "aqlm": "AQLM", "vptq": "VPTQ", "bitnet": "BitNet", "exl2": "EXL2", "exl3": "EXL3",
    "modelopt": "ModelOpt", "mlx": "MLX", "marlin": "Marlin",
}  # fmt: skip
_NESTED_DEEP = 4
_CONFIG_KEYS = ("quantization_config", "compression_config")
# Kinds by the name of a tensor that is not floating point, most telling first.
_BY_NAME = tuple(
    (re.compile(pattern, re.ASCII), kind)
    for pattern, kind in (
        (r"\.quant_state\.|\.absmax$", "bitsandbytes 4 bit"),
        (r"(^|\.)weight_format$", "bitsandbytes 8 bit"),
        (r"(^|\.)g_idx$", "GPTQ"),
        (r"(^|\.)qweight(_type)?$", "GPTQ or AWQ"),
        (r"(^|\.)weight_packed$", "compressed-tensors"),
        (r"(^|\.)weight\._(data|packed)", "quanto"),
        (
            r"(^|[._])weight[._:](_?data[.:])?_?(qdata|int_data|tensor_impl|layout_tensor)",
            "torchao",
        ),
        (r"(^|\.)W_q", "HQQ"),
        (r"(^|\.)dense_weights$", "SpQR"),
        (r"(^|\.)weight_quantizer\.", "Quark"),
        (r"(^|\.)q_(weight|invperm|groups)$", "EXL2"),
        (r"(^|\.)trellis$", "EXL3"),
        (r"(^|\.)Qidxs$", "QuIP#"),
        (r"(^|\.)bitmask$", "compressed-tensors, sparse"),
    )
)
# HQQ packs its integers into numbers where it is told to.
_FLOAT_CODES = re.compile(r"(^|\.)W_q$", re.ASCII)
# Scales that no full-precision layer has beside its weight: that is codes in another dtype.
_SCALES_OF_WEIGHT = re.compile(
    r"^(.*\.)?(weight_scale(_inv|_2)?|weight_zero_point|scale_weight|SCB)$", re.ASCII
)
# Integers whose last name says that they are a weight.
_WEIGHT = re.compile(
    r"(^|[._])(weight|kernel|W|_packed_params|weight_(q|int\d|quant(ized)?|codes?))$", re.ASCII
)
# Marlin's codes, named by one letter: known by the scales beside them.
_MARLIN, _MARLIN_SCALES = re.compile(r"^(.*\.)?B$", re.ASCII), ("s", "s_channel", "s_group")
_BLOCKS, _SCALES = re.compile(r"^(.*)_blocks$", re.ASCII), "_scales"
# Floating-point tensors beside codes: in their module, and under their own name and this.
_IN_MODULE = (
    "scales", "scale_inv", "weight_scale", "weight_scales", "weight_scale_inv", "weight_scale_2",
    "absmax", "zeros", "zero_point", "SCB", "codebooks", "centroids.weight",
)  # fmt: skip
_AFTER_NAME = ("scale", "scales", "scale_inv", "absmax", "zero_point")


class QuantisedError(CheckpointError):
    """A checkpoint's weights are codes of a quantiser, not numbers."""

    reason = "quantised"


class Tensor(Protocol):
    """What of a tensor is looked at."""

    @property
    def dtype(self) -> str:
        """In safetensors' words."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes, where it holds any."""

    @property
    def is_float(self) -> bool:
        """Whether a delta of it can be formed."""


class Declared(NamedTuple):
    """What a model's files say of its quantisation: the kind, the file, its settings."""

    kind: str
    file: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Quantisation:
    """How a checkpoint is quantised, and by what that was seen.

    ``codes`` is whether tensors are codes; else a file alone says so. ``dequantises`` is whether
    `dare-agg dequantise` makes numbers of them.
    """

    kind: str
    evidence: str
    codes: bool
    dequantises: bool = False


def declared_by(folder: Path) -> Declared | None:
    """What ``config.json`` or a quantiser's own file says of a folder's weights; None: nothing.

    Files that cannot be read say nothing.
    """
    found = declared_in(read_settings(folder / "config.json"))
    if found is not None:
        return found
    params = read_settings(folder / "params.json").get("quantization")
    if isinstance(params, dict) and params:
        return Declared(_kind_of(params, "FP8"), "params.json", params)
    for name, kind in _BESIDE.items():
        settings = read_settings(folder / name)
        if settings:
            inner = settings.get("quantization")
            settings = inner if isinstance(inner, dict) else settings
            return Declared(_kind_of(settings, kind), name, settings)
    return None


def declared_in(config: Mapping[str, Any]) -> Declared | None:
    """What a model's configuration says of its quantisation, in nested configurations too."""
    for settings in _settings(config, 0):
        return Declared(_kind_of(settings, "unnamed"), "config.json", settings)
    bits = config.get("quantization_bit")
    if isinstance(bits, int) and bits > 0:
        return Declared(f"ChatGLM, {int(bits)} bit", "config.json", {"bits": bits})
    own = config.get("quantization")
    if isinstance(own, dict) and {"bits", "group_size"} & own.keys():
        return Declared(_kind_of(own, "MLX"), "config.json", own)
    return None


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration, nested ones too, without what says that it is quantised."""
    return {
        key: without_quantisation(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _CONFIG_KEYS
    }


def quantisation_of(tensors: Mapping[str, Tensor]) -> Quantisation | None:
    """Tell codes from weights and buffers by dtype, name and what stands beside them.

    Integers that are buffers (positions, counters, masks, indices) are no codes.
    """
    other = {name: t for name, t in tensors.items() if not t.is_float}
    if (found := _small_floats(other)) is not None:
        return found
    for pattern, kind in _BY_NAME:
        for name, tensor in other.items():
            if pattern.search(name):
                return Quantisation(kind, _said(name, tensor), True)
    for name, tensor in other.items():
        marlin = _MARLIN.match(name)
        if marlin and any(f"{marlin[1] or ''}{word}" in tensors for word in _MARLIN_SCALES):
            return Quantisation("Marlin", _said(name, tensor), True)
        blocks = _BLOCKS.match(name)
        if blocks and f"{blocks[1]}{_SCALES}" in other:
            return Quantisation("MXFP4", _said(name, tensor), True)
    for name, tensor in other.items():
        if any(size > 1 for size in tensor.shape) and (
            _WEIGHT.search(name) or _has_companion(name, tensors)
        ):
            return Quantisation(_by_dtype(name, tensor, tensors), _said(name, tensor), True)
    for name, tensor in tensors.items():
        if tensor.is_float and _FLOAT_CODES.search(name):
            return Quantisation("HQQ", _said(name, tensor), True)
        scale = _SCALES_OF_WEIGHT.match(name)
        weight = f"{scale[1] or ''}weight" if scale else ""
        if weight in tensors:
            return Quantisation("codes with scales", f"tensor {name[:120]!r} beside it", True)
    return None


def _small_floats(other: Mapping[str, Tensor]) -> Quantisation | None:
    """Floats of 8 bits and less; where only scales are such, what they scale is NVFP4."""
    small = [name for name, t in other.items() if t.dtype.startswith(("F8_", "F6_", "F4"))]
    codes = [name for name in small if "scale" not in name]
    for name in codes or small:
        kind = "FP8" if other[name].dtype.startswith("F8_") else "FP4"
        packed = not codes and any(t.dtype == "U8" for t in other.values())
        return Quantisation("NVFP4" if packed else kind, _said(name, other[name]), True)
    return None


def check_not_quantised(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `QuantisedError` where tensors are codes, or a file in ``path`` says so."""
    declared = declared_by(path) if path.is_dir() else None
    found = quantisation_of(tensors)
    if declared is not None:
        file = f"{declared.file} says"
        seen = found.evidence if found else file
        found = Quantisation(declared.kind, seen, found is not None, _all_fp8(tensors))
    elif found is not None:
        found = replace(found, dequantises=_all_fp8(tensors))
    if found is not None:
        raise refusal(path, found, declared)


def check_declared(folder: Path) -> None:
    """Raise `QuantisedError` where a folder's files say that its weights are quantised."""
    declared = declared_by(folder) if folder.is_dir() else None
    if declared is not None:
        said = Quantisation(declared.kind, f"{declared.file} says", True)
        raise refusal(folder, said, declared)


def gguf_refusal(file: Path) -> QuantisedError:
    """The error for a GGUF file, whose tensors are not read here."""
    return refusal(file, Quantisation("GGUF", "a llama.cpp file", True, True))


def refusal(
    path: Path | str, found: Quantisation, declared: Declared | None = None
) -> QuantisedError:
    """The error for a quantised model: its kind, how that was seen, and what helps."""
    if declared is not None and not found.codes:
        return QuantisedError(
            f"{path}: {declared.file} says that it is quantised ({found.kind}), its tensors are "
            f"floating point; if they are the full-precision weights, take that out of "
            f"{declared.file}, else give the model that it was made from"
        )
    way = f", or make one of the codes: dare-agg dequantise {path} -o OUT"
    return QuantisedError(
        f"{path} is quantised ({found.kind}: {found.evidence}); its weights are codes, which "
        "cannot be merged or compared: give the full-precision model that it was made from"
        f"{way if found.dequantises else ''}"
    )


def _all_fp8(tensors: Mapping[str, Tensor]) -> bool:
    rest = {name: t for name, t in tensors.items() if not t.dtype.startswith("F8_")}
    return len(rest) < len(tensors) and quantisation_of(rest) is None


def _settings(config: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
    """The quantisation settings of a configuration, its own before those of its parts."""
    for key in _CONFIG_KEYS:
        settings = config.get(key)
        if isinstance(settings, dict) and settings and not _switched_off(settings):
            yield settings
    if depth < _NESTED_DEEP:
        for part in config.values():
            if isinstance(part, dict):
                yield from _settings(part, depth + 1)


def _switched_off(settings: Mapping[str, Any]) -> bool:
    """Whether it is a bitsandbytes configuration of a model that was loaded in full precision."""
    loads = [settings[key] for key in ("load_in_4bit", "load_in_8bit") if key in settings]
    return bool(loads) and not any(loads) and "bits" not in settings


def _kind_of(settings: Mapping[str, Any], otherwise: str) -> str:
    method = settings.get("quant_method") or settings.get("quant_algo") or settings.get("format")
    if not isinstance(method, str):
        if "desc_act" in settings:
            method = "gptq"
        elif "w_bit" in settings or "zero_point" in settings:
            method = "awq"
        elif settings.get("load_in_4bit") or settings.get("load_in_8bit"):
            method = "bitsandbytes"
        elif otherwise == "unnamed" and {"bits", "group_size"} <= settings.keys():
            method = "mlx"
        else:
            method = otherwise
    words = [_SPELLING.get(method.lower(), method[:40])]
    bits = settings.get("bits", settings.get("w_bit"))
    if settings.get("load_in_4bit"):
        bits = 4
    elif settings.get("load_in_8bit"):
        bits = 8
    if isinstance(bits, int):
        words.append(f"{bits} bit")
    return ", ".join(words)


def _said(name: str, tensor: Tensor) -> str:
    return f"tensor {name[:120]!r} of {tensor.dtype}"


def _has_companion(name: str, tensors: Mapping[str, Tensor]) -> bool:
    module = name.rpartition(".")[0]
    beside = [f"{module}.{word}" if module else word for word in _IN_MODULE]
    beside += [f"{name}_{word}" for word in _AFTER_NAME]
    return any(other in tensors and tensors[other].is_float for other in beside)


def _by_dtype(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> str:
    """What integers under a weight's name are, where no name says it."""
    module = name.rpartition(".")[0]
    if f"{module}.codebooks" in tensors:
        return "AQLM"
    if f"{module}.centroids.weight" in tensors:
        return "VPTQ"
    if tensor.dtype == "U32" and f"{module}.scales" in tensors:
        return "MLX"
    if tensor.dtype == "I8" and f"{module}.SCB" in tensors:
        return "bitsandbytes 8 bit"
    if tensor.dtype == "I8" and f"{module}.weight_scales" in tensors:
        return "EETQ"
    if tensor.dtype == "I8" and f"{module}.weight_scale" in tensors:
        return "INT8, compressed-tensors"
    if tensor.dtype == "U8" and f"{module}.weight_scale" in tensors:
        return "BitNet"
    return f"{tensor.dtype} weights"
