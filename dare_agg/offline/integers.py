"""Tensors that are not merged, integers and masks: OUT has BASE's, so a model must not have others.

Positions, masks and indices are the same in every model of an architecture. Where they are
not, something was trained, packed or built otherwise, and BASE's would be another model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint import Checkpoint
from dare_agg.checkpoint.families import is_buffer
from dare_agg.checkpoint.reader import TensorInfo
from dare_agg.errors import LayoutError
from dare_agg.vectors.patterns import Pattern, matches

_BLOCK = 1 << 20
# As safetensors says it; what has no word here is compared byte by byte.
_NUMPY = {
    "I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4", "I16": "<i2", "U16": "<u2",
    "I8": "<i1", "U8": "<u1", "BOOL": "<u1", "C64": "<c8",
}  # fmt: skip


def check_same_integers(base: Checkpoint, model: Checkpoint, excluded: Sequence[Pattern]) -> None:
    """Raise `LayoutError` for the first tensor, not floating point, that ``model`` has otherwise.

    Counters (of one element, as batch norm's) may differ, and dtypes that hold the same values.
    What ``model`` lacks is BASE's.
    """
    for name, info in base.tensors.items():
        other = model.tensors.get(name)
        if info.is_float or other is None or info.size <= 1 or matches(name, excluded):
            continue
        if info.size == other.size and _equal(base, model, name):
            continue
        what = f"{info.dtype} of shape {info.shape} in BASE, {other.dtype} of {other.shape} there"
        if (info.dtype, info.shape) == (other.dtype, other.shape):
            what = f"{info.dtype}, with other values than BASE's"
        raise LayoutError(
            f"{model.path}: tensor {name!r} is {what}; only floating point is merged: if BASE's "
            f"serves the result, keep it: --exclude '^{re.escape(name)}$'"
        )


def check_same_masks(
    base: Checkpoint,
    model: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    masks: Collection[str],
    excluded: Sequence[Pattern],
) -> None:
    """Raise `LayoutError` for the first of BASE's ``masks`` that ``model`` has otherwise.

    ``tensors`` are the model's under BASE's names.
    """
    for name in sorted(masks):
        own = tensors.get(name)
        if own is None or matches(name, excluded):
            continue
        if not np.array_equal(base.array(name), model.array(own.name)):
            raise LayoutError(
                f"{model.path}: {own.name!r} is a mask of minus infinity in BASE, and another "
                "there; masks are not merged: if BASE's serves the result, keep it: "
                f"--exclude '^{re.escape(name)}$'"
            )


def check_integers_known(
    model: Checkpoint, matched: Collection[str], excluded: Sequence[Pattern]
) -> None:
    """Raise `LayoutError` for a tensor, not floating point, that BASE lacks and that is no buffer.

    ``matched`` are the tensors of ``model``, by its own names, that BASE has.
    """
    for name, info in model.tensors.items():
        if info.is_float or info.size <= 1 or name in matched or matches(name, excluded):
            continue
        if not is_buffer(name, info.shape):
            raise LayoutError(
                f"{model.path} has tensor {name!r} of {info.dtype} that BASE lacks; only floating "
                "point is merged: if the result does without it, leave it out: "
                f"--exclude '^{re.escape(name)}$'"
            )


def _equal(base: Checkpoint, model: Checkpoint, name: str) -> bool:
    """Whether two tensors of one size hold the same values, looked at block by block."""
    one, other = _elements(base, name), _elements(model, name)
    return one.size == other.size and all(
        np.array_equal(one[lo : lo + _BLOCK], other[lo : lo + _BLOCK])
        for lo in range(0, one.size, _BLOCK)
    )


def _elements(model: Checkpoint, name: str) -> NDArray[np.generic]:
    info, stored = model.tensors[name], model.raw(name)
    if info.is_float:
        return model.array(name).reshape(-1)
    word = _NUMPY.get(info.dtype)
    if word is None:
        return stored
    if stored.ctypes.data % np.dtype(word).itemsize:
        stored = stored.copy()
    return stored.view(word)
