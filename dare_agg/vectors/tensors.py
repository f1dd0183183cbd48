"""Named tensors where they lie, read as one flat vector: nothing of them is copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.sources import DeltaSource, Positions, take


@dataclass(frozen=True)
class TensorSource:
    """Arrays of any floating-point dtype over a layout, as float32 (a `DeltaSource`).

    What ``tensors`` does not hold is read from ``otherwise``, a source over the whole layout.
    Raises `LayoutError` as `Layout.flatten` does; without ``otherwise`` for what is missing too.
    """

    layout: Layout
    tensors: Mapping[str, NDArray[Any]]
    otherwise: DeltaSource | None = None
    _flat: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for entry in self.layout.entries:
            if entry.name in self.tensors or self.otherwise is None:
                array = self.layout.tensor(self.tensors, entry)
                # An array that is laid out otherwise would be copied whole to be made flat.
                flat = array.reshape(-1) if array.flags.c_contiguous else array.flat
                self._flat[entry.name] = flat

    @property
    def size(self) -> int:
        return self.layout.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with the elements ``lo`` to ``hi``."""
        for entry, first, last in self.layout.pieces(lo, hi):
            at = entry.offset - lo
            piece, flat = out[at + first : at + last], self._flat.get(entry.name)
            if flat is not None:
                piece[:] = flat[first:last]
            elif self.otherwise is not None:
                self.otherwise.read(entry.offset + first, entry.offset + last, piece)

    def take(self, positions: Positions) -> FloatVector:
        """Return the elements at ascending positions."""
        out = np.empty(positions.size, np.float32)
        for entry, first, last in self.layout.runs(positions):
            flat = self._flat.get(entry.name)
            if flat is not None:
                out[first:last] = flat[positions[first:last] - entry.offset]
            elif self.otherwise is not None:
                out[first:last] = take(self.otherwise, positions[first:last])
        return out
