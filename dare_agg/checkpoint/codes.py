"""Codes of a quantiser among a model's tensors, told from weights by dtype, name and neighbours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

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


def all_fp8(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all that are codes are FP8, which numbers can be made of."""
    rest = {name: t for name, t in tensors.items() if not t.dtype.startswith("F8_")}
    return len(rest) < len(tensors) and quantisation_of(rest) is None


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
