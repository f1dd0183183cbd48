"""A model as parameters of fewer bits hold it: what training that loads them really begins from.

The change that training made is what it ended with less what it began with. A version of the
global model is float32; where a client's parameters are bfloat16 or float16, the version was
rounded when it was loaded, and that rounding is no change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import LayoutError, NonFiniteError
from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.model import GlobalModel
from dare_agg.vectors.sources import ArraySource, DeltaSource, Positions, take
from dare_agg.vectors.tiled import TiledVector

# Of parameters; the first two hold every float32.
PARAMETER_DTYPES = ("float32", "float64", "bfloat16", "float16")
_EXACT = PARAMETER_DTYPES[:2]


def bfloat16_bits(values: FloatVector) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 (to nearest, ties to even), as its 16 bits."""
    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    return rounded.view(np.uint16)[1::2]


def rounded_model(model: GlobalModel, dtypes: Mapping[str, str]) -> GlobalModel:
    """The model as parameters of ``dtypes`` hold it, under its own name; nothing is copied.

    ``dtypes`` are words of `PARAMETER_DTYPES` by tensor; what is not there is float32. Raises
    `LayoutError` for another word, and when it is read `NonFiniteError` for a value that is too
    large for its dtype.
    """
    groups = model.groups
    for name, word in dtypes.items():
        if word not in PARAMETER_DTYPES:
            raise LayoutError(
                f"parameter {name!r} has dtype {word}, which cannot hold a version of the global "
                f"model; load the model as one of {', '.join(PARAMETER_DTYPES)}"
            )
    coarse = {name: word for name, word in dtypes.items() if word not in _EXACT}
    if not coarse.keys() & {*groups.layout.names, *groups.dense_layout.names}:
        return replace(model, named=model.ref)
    delta = model.delta
    inner = delta.source if isinstance(delta, TiledVector) else ArraySource(delta)
    dense = np.empty(model.dense.size, np.float32)
    RoundedSource(groups.dense_layout, ArraySource(model.dense), coarse).read(0, dense.size, dense)
    source = RoundedSource(groups.layout, inner, coarse)
    return model.placed(TiledVector(source), dense, model.ref)


@dataclass(frozen=True)
class RoundedSource:
    """A source over a layout whose tensors are rounded to ``dtypes`` (bfloat16, float16) by name.

    Raises `NonFiniteError` where a finite value is too large for its dtype.
    """

    layout: Layout
    source: DeltaSource
    dtypes: Mapping[str, str]

    @property
    def size(self) -> int:
        return self.layout.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with the rounded elements ``lo`` to ``hi``."""
        self.source.read(lo, hi, out)
        for entry, first, last in self.layout.pieces(lo, hi):
            at = entry.offset - lo
            self._round(entry.name, out[at + first : at + last])

    def take(self, positions: Positions) -> FloatVector:
        """Return the rounded elements at ascending positions."""
        picked = take(self.source, positions)
        for entry, first, last in self.layout.runs(positions):
            self._round(entry.name, picked[first:last])
        return picked

    def _round(self, name: str, values: FloatVector) -> None:
        """Round a tensor's values in place."""
        word = self.dtypes.get(name, "float32")
        if word in _EXACT:
            return
        if word == "bfloat16":
            rounded = np.left_shift(bfloat16_bits(values), 16, dtype=np.uint32).view(np.float32)
        else:
            with np.errstate(over="ignore"):
                rounded = values.astype(np.float16).astype(np.float32)
        finite = np.isfinite(rounded)
        if not finite.all():
            raise NonFiniteError(
                f"{values[int(np.argmin(finite))]:g} in tensor {name!r} of the version does not "
                f"fit {word}; load the model's parameters as float32"
            )
        values[:] = rounded
