"""Arrays of a Flower record that are read when they are looked at, and not kept.

A record of them costs nothing until code reads a tensor, and then that tensor alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from dare_agg.flower.transport import to_record
from dare_agg.vectors.model import GlobalModel
from dare_agg.vectors.tiled import TiledVector

# How Flower calls arrays that NumPy can read.
_STYPE = Array(np.empty(0, np.float32)).stype
_Read = Callable[[], NDArray[np.generic]]


class LazyArray(Array):
    """An array that is made anew each time it is read; given other data, a plain one."""

    def __init__(self, dtype: np.dtype, shape: tuple[int, ...], read: _Read) -> None:
        self.__dict__.update(dtype=str(dtype), shape=shape, stype=_STYPE, _read=read, _own=b"")

    @property
    def untouched(self) -> bool:
        """Whether it still is what it was made as."""
        return self.__dict__["_read"] is not None

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The bytes as Flower serialises them."""
        read = self.__dict__["_read"]
        return Array(read()).data if read else self.__dict__["_own"]

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__.update(_read=None, _own=value)

    def numpy(self) -> NDArray[np.generic]:
        """The tensor, the caller's own to change."""
        read = self.__dict__["_read"]
        return read() if read else super().numpy()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        ours, theirs = ((a.dtype, a.shape, a.stype, a.data) for a in (self, other))
        return ours == theirs

    def __repr__(self) -> str:
        return f"LazyArray(dtype={self.dtype!r}, shape={self.shape!r})"

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are plain arrays, without what is behind it."""
        return Array, (self.dtype, self.shape, self.stype, self.data)


def is_untouched(array: Array) -> bool:
    """Whether an array is a lazy one that nobody has given other data."""
    return isinstance(array, LazyArray) and array.untouched


def lazy_record(arrays: Mapping[str, Array]) -> ArrayRecord:
    """A record of these very arrays; made of a dictionary, Flower's would read them."""
    record = ArrayRecord()
    record.update(arrays)
    return record


def record_of(model: GlobalModel) -> ArrayRecord:
    """The model as Flower's arrays; of a model on disk, lazy ones."""
    arrays = model.arrays()
    if not on_disk(model):
        return to_record(arrays)

    def lazy(name: str) -> LazyArray:
        own = model.groups.copies.get(name, name)
        for layout in (model.groups.layout, model.groups.dense_layout):
            if own in layout:
                shape = layout[own].shape
                return LazyArray(model.groups.dtypes[name], shape, lambda: arrays[name])
        local = arrays[name]
        return LazyArray(local.dtype, local.shape, lambda: np.array(arrays[name]))

    return lazy_record({name: lazy(name) for name in model.groups.names})


def on_disk(model: GlobalModel) -> bool:
    """Whether a model's parameters are read in slices and never held as a whole."""
    return isinstance(model.delta, TiledVector)


def nbytes_of(record: ArrayRecord) -> int:
    """The bytes of a record's arrays; of lazy ones, what reading them would make."""
    return sum(
        np.dtype(array.dtype).itemsize * math.prod(array.shape)
        if is_untouched(array)
        else len(array.data)
        for array in record.values()
    )


__all__ = ["LazyArray", "is_untouched", "lazy_record", "nbytes_of", "on_disk", "record_of"]
