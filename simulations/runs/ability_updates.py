"""What one model hands over to a merge, and how many bits that took.

The library's own update of a delta, or the whole of it; tensors that ``exclude`` names stay as in
the base. Beside it, where asked for, the directions of the layers' inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import UpdateSpec, decode_update, encode_update
from dare_agg.vectors.layout import FloatVector, Layout, layout_of
from dare_agg.vectors.patterns import compile_patterns, matches
from dare_agg.vectors.sources import DeltaSource, array_source
from simulations.runs.directions import Directions, kept_directions, sent_directions

_MOST_RANK = 16


@dataclass(frozen=True)
class Sent:
    """What one model hands over: its values, and directions of its layers' inputs if asked for.

    ``bits`` are those of the values, ``direction_bits`` those of the directions, a parameter.
    """

    values: DeltaSource
    bits: float
    directions: Directions | None = None
    direction_bits: float = 0.0


@dataclass(frozen=True)
class PartSource:
    """A delta of some tensors of a layout, zero in the others."""

    layout: Layout
    part: Layout
    source: DeltaSource

    @property
    def size(self) -> int:
        """Number of elements, those of the other tensors included."""
        return self.layout.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with the delta's elements ``lo`` to ``hi``."""
        out[:] = 0
        for entry, first, last in self.layout.pieces(lo, hi):
            if entry.name in self.part:
                at = entry.offset + first - lo
                own = self.part[entry.name].offset
                self.source.read(own + first, own + last, out[at : at + last - first])


def send(
    name: str, delta: FloatVector, layout: Layout, update: Mapping[str, Any], seed: int, path: Path
) -> Sent:
    """Return what a model sends by the words of a cell's ``update``.

    ``drop_rate`` and ``values`` are those of the library's update ("0": the whole delta),
    ``exclude`` a pattern of tensors, ``rank`` and ``bits`` those of the directions, which are kept
    beside the delta's file, ``path``.
    """
    part = layout
    if update.get("exclude"):
        out = compile_patterns([update["exclude"]])
        part = layout_of({e.name: e.shape for e in layout.entries if not matches(e.name, out)})
    source: DeltaSource = array_source(delta)
    if part is not layout:
        source = array_source(
            np.concatenate([delta[layout[n].offset : layout[n].stop] for n in part.names])
        )
    bits = 32 * part.size / layout.size
    rate = str(update.get("drop_rate", "0"))
    if rate != "0":
        spec = UpdateSpec(
            size=part.size,
            drop_rate=parse_drop_rate(rate),
            mask="stratified",
            mask_key=derive_key(seed_secret(seed), "mask", name.encode()),
            values_key=derive_key(seed_secret(seed), "values", name.encode()),
            rank=0,
            values=update.get("values", "b1"),
            base="00" * 32,
            layout=part.fingerprint,
        )
        blob = encode_update(spec, source)
        source, bits = decode_update(blob, spec), 8 * len(blob) / layout.size
    if part is not layout:
        source = PartSource(layout, part, source)
    if not update.get("rank"):
        return Sent(source, bits)
    beside = path.with_name(f"{path.stem}-directions-{_MOST_RANK}.safetensors")
    exact = kept_directions(beside, layout, delta, _MOST_RANK)
    key = derive_key(seed_secret(seed), "directions", name.encode())
    directions, extra = sent_directions(exact, layout, update["rank"], update["bits"], key)
    return Sent(source, bits, directions, extra / layout.size)
