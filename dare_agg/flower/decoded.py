"""A client's trained arrays as the server knows them: decoded when they are looked at.

What a strategy's own code sees of a reply is what FedAvg's would: an ArrayRecord of whole
tensors, base plus decoded delta. Nothing is decoded before it is read and nothing is kept after;
what was not changed is merged from the update itself, and what was changed as it is now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from dare_agg.errors import LayoutError
from dare_agg.rounds.server import Accepted
from dare_agg.vectors.layout import Entry, Layout, check_finite
from dare_agg.vectors.model import GlobalModel, Groups
from dare_agg.vectors.sources import DeltaSource, array_source
from dare_agg.vectors.tied import came_apart, sets_of
from dare_agg.vectors.tiled import AnyVector

# How Flower calls arrays that NumPy can read.
_STYPE = Array(np.empty(0, np.float32)).stype
_Read = Callable[[], NDArray[np.generic]]


class DecodedArray(Array):
    """An array that is decoded anew each time it is read; given other data, a plain one."""

    def __init__(self, dtype: np.dtype, shape: tuple[int, ...], read: _Read) -> None:
        self.__dict__.update(dtype=str(dtype), shape=shape, stype=_STYPE, _read=read, _own=b"")

    @property
    def untouched(self) -> bool:
        """Whether it still is what the client sent."""
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

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are plain arrays, without the model and the update behind it."""
        return Array, (self.dtype, self.shape, self.stype, self.data)


Decoded = Mapping[str, DecodedArray]


def decoded_arrays(model: GlobalModel, accepted: Accepted) -> Decoded:
    """All tensors of the model as one client trained them, in the model's order and dtypes.

    Tensors that never leave a client are the server's.
    """
    groups = model.groups
    found: dict[str, tuple[Entry, AnyVector, DeltaSource]] = {}
    for layout, base, source in _groups(model, accepted):
        found.update({entry.name: (entry, base, source) for entry in layout.entries})

    def array(name: str) -> DecodedArray:
        dtype = groups.dtypes[name]
        own = groups.copies.get(name, name)
        if own not in found:
            local = model.local[name]
            return DecodedArray(dtype, local.shape, lambda: np.array(local))
        entry, base, source = found[own]
        return DecodedArray(dtype, entry.shape, lambda: _read(entry, base, source, groups))

    return {name: array(name) for name in groups.names}


def is_untouched(record: ArrayRecord, decoded: Decoded) -> bool:
    """Whether a record still holds what was decoded, all of it and nothing else."""
    return len(record) == len(decoded) and all(
        record.get(name) is array and array.untouched for name, array in decoded.items()
    )


def with_arrays(
    model: GlobalModel, accepted: Accepted, record: ArrayRecord, decoded: Decoded
) -> Accepted:
    """The reply with the arrays that a strategy's own code put in place of some or all.

    Those that are missing count as unchanged. Raises `LayoutError` for none of the model's
    tensors, other names or shapes, `NonFiniteError` for a NaN or an infinity.
    """
    strangers = sorted(set(record) - set(model.groups.names))
    known = [name for layout, *_ in _groups(model, accepted) for name in layout.names]
    if strangers or not any(name in record for name in known):
        what = f"{strangers[0]!r}, which the model has not" if strangers else "none of the model's"
        raise LayoutError(
            f"aggregate_train was given an ArrayRecord of {len(record)} tensors, {what}; pass the "
            "client's record on, or one with the model's names"
        )
    alike = _tied_alike(model, record, decoded)
    deltas = []
    for layout, base, source in _groups(model, accepted):
        delta = np.zeros(layout.size, np.float32)
        for entry in layout.entries:
            array = alike.get(entry.name, record.get(entry.name))
            piece = delta[entry.offset : entry.stop]
            if array is None or not entry.size:
                continue
            if array is decoded[entry.name] and decoded[entry.name].untouched:
                source.read(entry.offset, entry.stop, piece)
            else:
                values = model.groups.into_vector(entry.name, _values(entry, array))
                piece[:] = values - base[entry.offset : entry.stop]
        check_finite(layout, delta, "given to aggregate_train")
        deltas.append(array_source(delta))
    return replace(accepted, update=deltas[0], dense=deltas[1] if deltas[1:] else None)


def _tied_alike(model: GlobalModel, record: ArrayRecord, decoded: Decoded) -> dict[str, Array]:
    """What stands for each tied tensor of which something was changed; raises `LayoutError`."""
    found: dict[str, Array] = {}
    for first, *copies in sets_of(model.groups.copies).values():
        given = {name: record[name] for name in (first, *copies) if name in record}
        if all(array is decoded[name] and array.untouched for name, array in given.items()):
            continue
        if apart := came_apart(given, {name: array.numpy() for name, array in given.items()}):
            raise LayoutError(
                f"tensor {apart[0]!r}, given to aggregate_train, differs from {next(iter(given))!r}"
                " and they are one in the global model; change both alike"
            )
        found[first] = next(iter(given.values()))
    return found


def _groups(model: GlobalModel, accepted: Accepted) -> list[tuple[Layout, AnyVector, DeltaSource]]:
    groups: list[tuple[Layout, AnyVector, DeltaSource]] = [
        (model.groups.layout, model.delta, accepted.update)
    ]
    if accepted.dense is not None:
        groups.append((model.groups.dense_layout, model.dense, accepted.dense))
    return groups


def _read(
    entry: Entry, base: AnyVector, source: DeltaSource, groups: Groups
) -> NDArray[np.generic]:
    values = np.zeros(entry.size, np.float32)
    if entry.size:
        source.read(entry.offset, entry.stop, values)
        values += base[entry.offset : entry.stop]
    return groups.from_vector(entry.name, values.reshape(entry.shape))


def _values(entry: Entry, array: Array) -> NDArray[Any]:
    try:
        values = array.numpy()
    except (TypeError, ValueError, OSError) as error:
        raise LayoutError(
            f"tensor {entry.name!r}, given to aggregate_train, is no NumPy array: {error}"
        ) from error
    if values.shape != entry.shape or values.dtype.kind not in "fiu":
        raise LayoutError(
            f"tensor {entry.name!r}, given to aggregate_train, is {values.dtype} of shape "
            f"{values.shape}; the model has floating point of shape {entry.shape}"
        )
    return values.reshape(-1)
