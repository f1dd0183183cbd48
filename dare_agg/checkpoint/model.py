"""A checkpoint as the global model, where it lies: read in slices, nothing of it copied.

Groups, names and values are those of the loaded arrays (`dare_agg.vectors.model.global_model`,
``by_form``): a bfloat16 tensor counts as float32, in which its values are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint.reader import Checkpoint, widen
from dare_agg.vectors.model import Arrays, GlobalModel, split_tensors
from dare_agg.vectors.tiled import TiledVector

_NUMBERS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U64": "<u8", "I32": "<i4",
    "U32": "<u4", "I16": "<i2", "U16": "<u2", "I8": "i1", "U8": "u1", "BOOL": "?", "C64": "<c8",
}  # fmt: skip


def model_in(
    checkpoint: Checkpoint,
    *,
    dense: Iterable[str] = (),
    exclude: Iterable[str] = (),
    apart: Iterable[str] = (),
) -> GlobalModel:
    """Return the model that a checkpoint holds, as `split_tensors` groups it (``by_form``).

    ``delta`` is read from the file in slices, ``local`` tensors when they are looked at, the
    dense group is in memory. The model is named by its fingerprints, which this machine
    remembers while the files do not change; the first time all of the file is read.

    Raises `LayoutError` when nothing is left for the delta group.
    """
    found = {name: mapped(checkpoint, name) for name in checkpoint.names}
    groups = split_tensors(
        cast(Arrays, found), dense=dense, exclude=exclude, by_form=True, apart=apart
    )
    layout, dense_layout = groups.layout, groups.dense_layout
    model = GlobalModel(
        groups,
        TiledVector(checkpoint.reader(layout)),
        groups.flatten_dense({name: read_tensor(checkpoint, name) for name in dense_layout.names}),
        _LocalTensors(checkpoint, groups.local),
    )
    return model.known(checkpoint.fingerprint(layout))


def read_tensor(checkpoint: Checkpoint, name: str) -> NDArray[Any]:
    """Return a copy of a tensor in its shape: bfloat16 as float32, 8-bit floats as their bytes."""
    info = checkpoint.tensors[name]
    if info.dtype == "BF16":
        return checkpoint.array(name)
    return np.array(mapped(checkpoint, name))


def mapped(checkpoint: Checkpoint, name: str) -> NDArray[Any] | _Widened:
    """Return a tensor where it lies, in its shape; of bfloat16 what is read in parts, widened."""
    info, stored = checkpoint.tensors[name], checkpoint.raw(name)
    if info.dtype == "BF16":
        return _Widened(stored, info.shape)
    kind = _NUMBERS.get(info.dtype)
    # Numbers that NumPy has no kind for stay bytes, which no group but the local one takes.
    return stored if kind is None else stored.view(kind).reshape(info.shape)


@dataclass(frozen=True)
class _Widened:
    """A mapped bfloat16 tensor that has the looks of its float32 copy and is read in parts."""

    stored: NDArray[Any]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return self.stored.size

    def reshape(self, _: int) -> _Widened:
        return _Widened(self.stored, (self.size,))

    def __getitem__(self, part: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        picked = self.stored[part]
        out = np.empty(picked.size, np.float32)
        widen(picked, "BF16", out)
        return out


class _LocalTensors(Mapping[str, NDArray[np.generic]]):
    """The tensors of these names, each read when it is looked at."""

    def __init__(self, checkpoint: Checkpoint, names: tuple[str, ...]) -> None:
        self._checkpoint, self._names = checkpoint, dict.fromkeys(names)

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        if name not in self._names:
            raise KeyError(name)
        return read_tensor(self._checkpoint, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
