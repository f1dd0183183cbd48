"""A client's trained arrays as the server knows them: decoded when they are looked at.

What a strategy's own code sees of a reply is what FedAvg's would: an ArrayRecord of whole
tensors, base plus decoded delta. Nothing is decoded before it is read and nothing is kept after;
what was not changed is merged from the update itself, and what was changed as it is now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from threading import local
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from dare_agg.errors import LayoutError
from dare_agg.flower.lazy import LazyArray, is_untouched
from dare_agg.rounds.server import Accepted
from dare_agg.vectors.layout import Entry, FloatVector, Layout, check_finite
from dare_agg.vectors.model import GlobalModel, Groups
from dare_agg.vectors.sources import DeltaSource
from dare_agg.vectors.tied import came_apart, sets_of
from dare_agg.vectors.tiled import AnyVector

Decoded = Mapping[str, LazyArray]


def decoded_arrays(model: GlobalModel, accepted: Accepted) -> Decoded:
    """All tensors of the model as one client trained them, in the model's order and dtypes.

    Tensors that never leave a client are the server's.
    """
    groups = model.groups
    found: dict[str, tuple[Entry, AnyVector, DeltaSource]] = {}
    for layout, base, source in _groups(model, accepted):
        found.update({entry.name: (entry, base, source) for entry in layout.entries})

    def array(name: str) -> LazyArray:
        dtype = groups.dtypes[name]
        own = groups.copies.get(name, name)
        if own not in found:
            shape = model.local[name].shape
            return LazyArray(dtype, shape, lambda: np.array(model.local[name]))
        entry, base, source = found[own]
        return LazyArray(dtype, entry.shape, lambda: _read(entry, base, source, groups))

    return {name: array(name) for name in groups.names}


def is_as_decoded(record: ArrayRecord, decoded: Decoded) -> bool:
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
        given = {name: alike.get(name, record.get(name)) for name in layout.names}
        kept = {n for n, array in given.items() if array is decoded[n] and is_untouched(array)}
        changed = {n: array for n, array in given.items() if array is not None and n not in kept}
        delta = GivenDelta(layout, base, changed, model.groups, source, frozenset(kept))
        delta.check("given to aggregate_train")
        deltas.append(delta)
    return replace(accepted, update=deltas[0], dense=deltas[1] if deltas[1:] else None)


@dataclass(frozen=True)
class GivenDelta:
    """The delta of a group of which an app's own code has put arrays in place of some tensors.

    Of ``given`` it is what they differ from ``base`` by, of those that are ``kept`` what
    ``source`` says, of all others zero. A tensor is read when a part of it is wanted, and each
    thread keeps its last one.
    """

    layout: Layout
    base: AnyVector
    given: Mapping[str, Array]
    groups: Groups
    source: DeltaSource | None = None
    kept: frozenset[str] = frozenset()
    _last: local = field(default_factory=local, init=False, repr=False, compare=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.layout.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with the elements ``lo`` to ``hi``."""
        for entry, first, last in self.layout.pieces(lo, hi):
            at = entry.offset - lo
            part = out[at + first : at + last]
            if entry.name in self.given:
                part[:] = self._of(entry)[first:last]
            elif self.source is not None and entry.name in self.kept:
                self.source.read(entry.offset + first, entry.offset + last, part)
            else:
                part[:] = 0

    def check(self, what: str) -> None:
        """Raise `LayoutError` or `NonFiniteError` for given arrays that are no tensors of these."""
        for entry in self.layout.entries:
            if entry.name in self.given and entry.size:
                one = Layout((replace(entry, offset=0),))
                check_finite(one, self._of(entry), what)

    def _of(self, entry: Entry) -> FloatVector:
        name, delta = getattr(self._last, "tensor", ("", np.empty(0, np.float32)))
        if name != entry.name:
            values = self.groups.into_vector(entry.name, _values(entry, self.given[entry.name]))
            delta = np.empty(entry.size, np.float32)
            delta[:] = values - self.base[entry.offset : entry.stop]
            self._last.tensor = (entry.name, delta)
        return delta


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
