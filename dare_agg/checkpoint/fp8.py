"""Weights of 8 bits back as numbers: values of a table times scales, of a tensor, row or block.

    weight[i, j] = value(code[i, j]) · scale[i // block, j // block]

as transformers' fine-grained FP8 does when it dequantises. What the scales are called differs
(``weight_scale_inv`` of DeepSeek and Qwen, ``weight_scale`` of compressed-tensors, ModelOpt and
fbgemm, ``scale_weight`` of ComfyUI); all of them multiply.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint.codes import quantisation_of
from dare_agg.checkpoint.quantised import QuantisedError
from dare_agg.checkpoint.reader import Checkpoint, TensorInfo
from dare_agg.vectors.layout import FloatVector

# (bits of the exponent, of the mantissa, bias, whether it has no infinities, and -0 is its NaN).
_FORMATS = {
    "F8_E4M3": (4, 3, 7, True, False),
    "F8_E5M2": (5, 2, 15, False, False),
    "F8_E4M3FNUZ": (4, 3, 8, True, True),
    "F8_E5M2FNUZ": (5, 2, 16, True, True),
}
_EXPONENTS = ("F8_E8M0", "U8")
# After a weight's name, and in its module.
_AFTER_NAME = ("_scale_inv", "_scale", ".scale_inv", ".scale")
_IN_MODULE = ("scale_inv", "scale", "scale_weight")
# Scales of what flows through a layer, of no use without its kernels.
_ACTIVATIONS = re.compile(
    r"(^|[._])((input|activation|output|act|[qkv])_scale(_inv)?|scale_(input|output))$", re.ASCII
)
# Says that a file holds codes (ComfyUI's), and is none itself.
_MARKER = "scaled_fp8"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Fp8Weights:
    """Which of a checkpoint's tensors are codes, and which scales belong to them.

    ``scales`` has for each code tensor its scale's name, None where it has none. ``dropped`` are
    tensors that a full-precision model does not have.
    """

    scales: Mapping[str, str | None]
    dropped: frozenset[str]


def is_code(info: TensorInfo) -> bool:
    """Whether a tensor holds FP8 codes."""
    return info.dtype in _FORMATS


def fp8_weights(model: Checkpoint) -> Fp8Weights | None:
    """Find the FP8 codes of a checkpoint and their scales; None where other codes are in it.

    Raises `QuantisedError` for codes beside which a scale stands under an unknown name.
    """
    scales: dict[str, str | None] = {}
    for name, info in model.tensors.items():
        if is_code(info) and name != _MARKER:
            scales[name] = _scale_of(name, model)
    dropped = {scale for scale in scales.values() if scale is not None}
    dropped |= {_MARKER} & model.tensors.keys()
    dropped |= {n for n, t in model.tensors.items() if _ACTIVATIONS.search(n) and n not in scales}
    others = {n: t for n, t in model.tensors.items() if n not in scales and n not in dropped}
    if not scales or quantisation_of(others) is not None:
        return None
    return Fp8Weights(scales, frozenset(dropped))


def dequantised(
    model: Checkpoint, name: str, scale: str | None, block: tuple[int, int] | None = None
) -> Iterator[tuple[int, FloatVector]]:
    """Yield a code tensor's values as float32, flat, in pieces with the place of their first one.

    ``block`` is the size of a block where the configuration says it; it matters where the last
    one is not whole. Raises `QuantisedError` where scales do not fit the codes.
    """
    info = model.tensors[name]
    table = _table(info.dtype)
    codes = model.raw(name).reshape(-1, info.shape[-1] if info.shape else 1)
    rows = info.shape[-2] if len(info.shape) > 1 else 1
    grid, by_rows, by_columns = _grid(model, info, scale, block)
    step = max(1, _CHUNK // max(1, codes.shape[1]))
    columns = np.arange(codes.shape[1]) // by_columns
    for first in range(0, codes.shape[0], step):
        values = table[codes[first : first + step]]
        at = np.arange(first, first + values.shape[0])
        values *= grid[at // rows, at % rows // by_rows][:, columns]
        yield first * codes.shape[1], values.reshape(-1)


def _scale_of(name: str, model: Checkpoint) -> str | None:
    module, dot, last = name.rpartition(".")
    names = [f"{name}{word}" for word in _AFTER_NAME]
    if last == "weight":
        names += [f"{module}{dot}{word}" for word in _IN_MODULE]
    for one in names:
        if one in model.tensors:
            return one
    beside = f"{module}{dot}"
    for other in model.tensors:
        own = other.removeprefix(beside)
        if _ACTIVATIONS.search(other) or not other.startswith(beside) or "." in own:
            continue
        if "scale" in own:
            raise QuantisedError(
                f"{model.path}: {other!r} stands beside the codes {name!r}, and how it scales them "
                "is not known; give the full-precision model that it was made from"
            )
    return None


def _grid(
    model: Checkpoint, info: TensorInfo, scale: str | None, block: tuple[int, int] | None
) -> tuple[NDArray[np.float32], int, int]:
    """Scales as (matrices, rows of blocks, columns of blocks), and how large a block is."""
    shape = (1,) * (2 - len(info.shape)) + info.shape
    *stack, rows, columns = shape
    matrices = int(np.prod(stack))
    if scale is None:
        return np.ones((matrices, 1, 1), np.float32), rows, columns
    found = model.tensors[scale]
    values = _scales(model, found)
    given = found.shape
    if values.size == 1:
        given = (1,) * len(shape)
    elif len(given) == 1:
        # Of each row, or of each matrix of a stack.
        given = (*given, *(1,) * (len(shape) - 1)) if len(shape) > 2 else (given[0], 1)
    if len(given) == len(shape) and all(
        a in (1, b) for a, b in zip(given[:-2], stack, strict=True)
    ):
        sizes = [
            _block(whole, parts, stated)
            for whole, parts, stated in zip(
                (rows, columns), given[-2:], block or (None, None), strict=True
            )
        ]
        if None not in sizes:
            grid = np.broadcast_to(values.reshape(given), (*stack, *given[-2:]))
            by_rows, by_columns = (size or 1 for size in sizes)
            return grid.reshape(matrices, *given[-2:]), by_rows, by_columns
    raise QuantisedError(
        f"{model.path}: scales {scale!r} of shape {found.shape} do not fit {info.name!r} of shape "
        f"{info.shape}; download it again, or give the full-precision model that it was made from"
    )


def _block(whole: int, parts: int, stated: int | None) -> int | None:
    """How many elements one of ``parts`` scales covers; None where they do not fit."""
    if parts < 1 or parts > max(1, whole):
        return None
    if stated and -(-whole // stated) == parts:
        return stated
    return whole // parts if whole % parts == 0 else None


def _scales(model: Checkpoint, info: TensorInfo) -> NDArray[np.float32]:
    if info.is_float:
        return model.array(info.name).reshape(-1)
    if info.dtype in _EXPONENTS:
        bytes_ = np.asarray(model.raw(info.name)).view(np.uint8).astype(np.float32)
        return np.where(bytes_ == 255, np.nan, np.exp2(bytes_ - 127)).astype(np.float32)
    raise QuantisedError(
        f"{model.path}: scales {info.name!r} are of {info.dtype}; give the full-precision model"
    )


def _table(dtype: str) -> NDArray[np.float32]:
    """The values of all 256 codes of a format."""
    exponent_bits, mantissa_bits, bias, finite, unsigned_zero = _FORMATS[dtype]
    codes = np.arange(256)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    values = np.where(
        exponent == 0,
        np.ldexp(fraction, 1 - bias),
        np.ldexp(1 + fraction, exponent - bias),
    )
    top = exponent == (1 << exponent_bits) - 1
    if unsigned_zero:
        values[0x80] = np.nan
    elif finite:
        values[top & (mantissa == (1 << mantissa_bits) - 1)] = np.nan
    else:
        values[top] = np.where(mantissa[top] == 0, np.inf, np.nan)
    return np.where(codes < 128, values, -values).astype(np.float32)
