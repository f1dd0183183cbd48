"""What training changed, read from where the trained tensors lie.

Survivors are gathered and subtracted on the tensor's own device, in float32: the host gets them
and nothing else, in the bits that it would have made itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dare_agg.errors import LayoutError, NonFiniteError
from dare_agg.torch.places import Held, on, over_tiles, picked
from dare_agg.vectors.layout import Entry, FloatVector, Layout
from dare_agg.vectors.rounded import RoundedSource
from dare_agg.vectors.sources import SAFE_DELTA, DeltaSource, Positions, take
from dare_agg.vectors.tiled import TiledVector

# As it is compared with in float32.
_SAFE = float(np.float32(SAFE_DELTA))


@dataclass(frozen=True)
class Measured:
    """Of |delta|: the sum of squares, the largest, and how many are above `SAFE_DELTA`."""

    squares: float
    largest: float
    above: int

    @property
    def norm(self) -> float:
        """The delta's norm."""
        return math.sqrt(self.squares)


@dataclass(frozen=True)
class TrainedDelta:
    """trained − start, a `DeltaSource` over a layout; a tensor that is not here is unchanged.

    ``start`` is what training began from, on the host: the version as the tensors' dtypes hold it.
    ``parts`` is what of each tensor lies here; of several processes, the one that ``leads``
    answers for tensors that are not there.
    """

    layout: Layout
    parts: Mapping[str, Held]
    start: DeltaSource
    leads: bool = True

    @property
    def size(self) -> int:
        return self.layout.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with the elements ``lo`` to ``hi``."""
        out[:] = self.take(np.arange(lo, hi))

    def take(self, positions: Positions) -> FloatVector:
        """Return the differences at ascending positions; raises as `changes`."""
        return self.changes(positions, take(self.start, positions))

    def changes(self, positions: Positions, start: FloatVector) -> FloatVector:
        """Return the differences at ascending positions to the values of ``start`` there.

        Raises `LayoutError` for one of a tensor whose part here does not hold it.
        """
        pieces = list(_cut(self.layout, self.parts, positions))
        return _gathered(pieces, positions.size, start)

    def spoken(self, positions: Positions) -> NDArray[np.int64]:
        """Which of some ascending positions this process answers for, ascending."""
        found = [np.empty(0, np.int64)]
        for _, part, index, first in _cut(self.layout, self.parts, positions):
            where: slice | Positions = slice(0, index.size if self.leads else 0)
            if part is not None:
                where = part.find(index)[0] if part.speaks else slice(0, 0)
            if isinstance(where, slice):
                where = np.arange(where.start, where.stop)
            found.append(first + where)
        return np.concatenate(found)

    def measure(self) -> Measured:
        """Measure what this process answers for, on the devices; the host gets three numbers.

        Raises `NonFiniteError` naming the first element that training left without a number.
        """
        squares, largest, above = 0.0, 0.0, 0
        wrong: NonFiniteError | None = None
        speaking = {name: part for name, part in self.parts.items() if part.speaks}
        source, dtypes = unrounded(self.start)
        for name, part, places, elements, values in over_tiles(self.layout, speaking, source):
            tuned = picked(part.local, places).float()
            begun = on(values, tuned.device)
            if name in dtypes:
                begun = begun.to(getattr(torch, dtypes[name])).float()
            change = (tuned - begun).abs_()
            # Numbers, not tensors: small ones kept between tiles would break up the memory.
            found = torch.stack(
                (
                    change.amax().double(),
                    change.square().sum(dtype=torch.float64),
                    (change > _SAFE).sum(dtype=torch.float64),
                )
            ).tolist()
            if wrong is None and not math.isfinite(found[0]):
                wrong = _not_finite(self.layout[name], elements, tuned)
            largest = max(largest, found[0])
            squares += found[1]
            above += int(found[2])
        # Not before the end: of a sharded model, all processes read the version together.
        if wrong is not None:
            raise wrong
        return Measured(squares, largest, above)


def unrounded(start: DeltaSource) -> tuple[DeltaSource, Mapping[str, str]]:
    """What a rounded source is made of, and the dtypes by tensor: a device rounds faster."""
    while isinstance(start, TiledVector):
        start = start.source
    return (start.source, start.dtypes) if isinstance(start, RoundedSource) else (start, {})


_Piece = tuple[Entry, Held | None, Positions, int]


def _cut(layout: Layout, parts: Mapping[str, Held], positions: Positions) -> Iterator[_Piece]:
    """Cut ascending positions by tensor: (entry, its part, flat elements of it, first place)."""
    for entry, first, last in layout.runs(positions):
        yield entry, parts.get(entry.name), positions[first:last] - entry.offset, first


def _gathered(pieces: list[_Piece], count: int, start: FloatVector) -> FloatVector:
    """Values of pieces less those of ``start``, 0 where there is no part.

    Neighbours on one device cost it one copy of places and starts, and the host one of survivors.
    """
    out = np.zeros(count, np.float32)
    for device, run in groupby(pieces, lambda piece: piece[1].local.device if piece[1] else None):
        if device is None:
            continue
        neighbours = list(run)
        first = neighbours[0][3]
        where = np.concatenate([_found(*piece[:3]) for piece in neighbours])
        here = slice(first, first + where.size)
        places = on(where, device)
        values = torch.empty(where.size, dtype=torch.float32, device=device)
        for _, part, index, at in neighbours:
            assert part is not None
            own = slice(at - first, at - first + index.size)
            values[own] = picked(part.local, places[own])
        values -= on(start[here], device)
        out[here] = values.cpu().numpy()
    return out


def _found(entry: Entry, part: Held | None, index: Positions) -> Positions:
    assert part is not None
    where = part.find(index)[1]
    if where.size != index.size:
        raise LayoutError(
            f"{index.size - where.size} elements of tensor {entry.name!r} lie with other "
            "processes; each reads what it answers for"
        )
    return where


def _not_finite(entry: Entry, elements: slice | Positions, tuned: Tensor) -> NonFiniteError | None:
    """The error of the first value that is no number; None where only the change is too large."""
    found = tuned.isfinite().logical_not().nonzero()
    if not len(found):
        return None
    at = int(found[0])
    element = elements.start + at if isinstance(elements, slice) else elements[at]
    index = tuple(int(i) for i in np.unravel_index(element, entry.shape or (1,)))
    return NonFiniteError(
        f"after training: {float(tuned[at])} in tensor {entry.name!r} at index {index}; only "
        "finite values can be merged: check the training step (learning rate, overflow)"
    )
