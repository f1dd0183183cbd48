"""Statistics that travel with an update: Fisher values of its survivors, or Gram matrices.

`fisher` and `regmean` weigh the clients by statistics of their data. In a round

- **fisher** values come for the elements that survive in the update only, by the same mask,
  so no index travels and they cost as much as as many survivors. All clients of the round
  share one mask: wherever one speaks, all speak, and the weighted mean is that of the full
  deltas, element by element.
- **gram** matrices come whole (their upper triangles) for the Linears that the client names.

Both are payloads in the form of an update, bound to the round plan like every update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import derive_key
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import Update, UpdateSpec, decode_update, encode_update
from dare_agg.codec.value_format import MAX_MAGNITUDE
from dare_agg.errors import LayoutError, UpdateError, did_you_mean
from dare_agg.rounds.plan import RoundPlan
from dare_agg.vectors.layout import FloatVector, Layout, check_finite, layout_of
from dare_agg.vectors.sources import DeltaSource
from dare_agg.vectors.tensors import TensorSource
from dare_agg.vectors.tiled import TiledVector

Statistics = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class StatisticsUpdate:
    """What a client sends beside its update: bytes, and the Linears of Gram matrices.

    Directions (`dare_agg.rounds.directions`) are bytes alone.
    """

    blob: bytes
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class GramMatrices(Mapping[str, NDArray[np.float32]]):
    """Gram matrices by the name of their weight, decoded when asked for."""

    update: Update
    triangles: Layout

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self.triangles:
            raise KeyError(name)
        entry = self.triangles[name]
        width = _width(entry.size)
        flat = np.empty(entry.size, np.float32)
        self.update.read(entry.offset, entry.stop, flat)
        gram = np.zeros((width, width), np.float32)
        gram[np.triu_indices(width)] = flat
        return gram + np.triu(gram, 1).T

    def __iter__(self) -> Iterator[str]:
        return iter(self.triangles.names)

    def __len__(self) -> int:
        return len(self.triangles.entries)


@dataclass(frozen=True)
class Kind:
    """How one kind of statistics travels.

    ``shape`` turns the specification of the plan's update into that of the statistics of the
    named tensors, ``lay_out`` what a client collected as one vector and those names, and
    ``read`` checks a decoded payload.
    """

    shape: Callable[[UpdateSpec, Layout, Sequence[str]], UpdateSpec]
    lay_out: Callable[[Layout, Statistics], tuple[FloatVector | DeltaSource, tuple[str, ...]]]
    read: Callable[[Update, Layout, Sequence[str]], DeltaSource | GramMatrices]


def statistics_spec(plan: RoundPlan, layout: Layout, names: Sequence[str] = ()) -> UpdateSpec:
    """What the statistics' payload of a plan must be; ``names`` are those of Gram matrices.

    Raises `LayoutError` where a name is no matrix of the delta group, or is there twice.
    """
    key = derive_key(plan.values_key, "statistics")
    context = hashlib.sha256(plan.terms.statistics.encode() + b"\0" + plan.digest()).digest()
    spec = replace(
        plan.spec(layout),
        values=plan.terms.statistics_values,
        values_key=key,
        rescale=False,
        context=context,
        most=MAX_MAGNITUDE,
    )
    return _kind(plan).shape(spec, layout, names)


def encode_statistics(plan: RoundPlan, layout: Layout, found: Statistics) -> StatisticsUpdate:
    """Encode what the client collected, by parameter name, as the plan asks for it.

    Fisher values of unused parameters may be missing: they count as 0. Raises `LayoutError`
    for a name or shape that does not fit, `NonFiniteError` for a value that is not finite.
    """
    if not found:
        raise LayoutError(
            f"training returned no {plan.terms.statistics} values; merge with a method that needs "
            "none, or collect them (dare_agg.merge.collect)"
        )
    vector, names = _kind(plan).lay_out(layout, found)
    return StatisticsUpdate(encode_update(statistics_spec(plan, layout, names), vector), names)


def decode_statistics(
    plan: RoundPlan, layout: Layout, sent: StatisticsUpdate
) -> DeltaSource | GramMatrices:
    """Check what a client sent; raises `UpdateError` (or `LayoutError`) for a bad payload."""
    update = decode_update(sent.blob, statistics_spec(plan, layout, sent.names))
    return _kind(plan).read(update, layout, sent.names)


def _kind(plan: RoundPlan) -> Kind:
    asked = plan.terms.statistics
    if asked not in KINDS:
        raise UpdateError(
            f"the round plan asks for {asked!r} values{did_you_mean(asked, KINDS)}; run the same "
            "dare-agg on server and clients",
            reason="plan",
        )
    return KINDS[asked]


# --- Fisher values -------------------------------------------------------------------------


def _survivors(spec: UpdateSpec, layout: Layout, names: Sequence[str]) -> UpdateSpec:
    return spec


@dataclass(frozen=True)
class _Zeros:
    """A source of nothing but zeros."""

    size: int

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        out[:] = 0


def _fisher_values(layout: Layout, found: Statistics) -> tuple[DeltaSource, tuple[str, ...]]:
    for name, array in found.items():
        # Others are of the dense or local tensors.
        if name in layout and array.shape != layout[name].shape:
            raise LayoutError(
                f"Fisher values of {name!r} have shape {array.shape}, the parameter "
                f"{layout[name].shape}"
            )
    source = TensorSource(layout, found, _Zeros(layout.size))
    check_finite(layout, TiledVector(source), "among the Fisher values")
    return source, ()


def _read_fisher(update: Update, layout: Layout, names: Sequence[str]) -> DeltaSource:
    for lo in range(0, update.survivors, 1 << 16):
        low = update.values(lo, min(update.survivors, lo + (1 << 16))).min()
        if low < 0:
            raise UpdateError(
                f"a Fisher value is {low:g}; squares are at least 0", reason="statistics"
            )
    return update


# --- Gram matrices -------------------------------------------------------------------------


def _whole(spec: UpdateSpec, layout: Layout, names: Sequence[str]) -> UpdateSpec:
    triangles = _triangles(layout, names)
    return replace(
        spec,
        size=triangles.size,
        drop_rate=parse_drop_rate(0),
        mask="stratified",
        rank=0,
        layout=triangles.fingerprint,
        rates=None,
    )


def _gram_vector(layout: Layout, found: Statistics) -> tuple[FloatVector, tuple[str, ...]]:
    names = tuple(sorted(name for name in found if name in layout))
    triangles = _triangles(layout, names)
    vector = np.empty(triangles.size, np.float32)
    for entry in triangles.entries:
        gram, width = found[entry.name], _width(entry.size)
        if gram.shape != (width, width):
            raise LayoutError(
                f"Gram matrix of {entry.name!r} has shape {gram.shape}, ({width}, {width}) is "
                "needed: one row and column an input"
            )
        vector[entry.offset : entry.stop] = gram[np.triu_indices(width)]
    check_finite(triangles, vector, "among the Gram matrices")
    return vector, names


def _read_grams(update: Update, layout: Layout, names: Sequence[str]) -> GramMatrices:
    return GramMatrices(update, _triangles(layout, names))


def _triangles(layout: Layout, names: Sequence[str]) -> Layout:
    """Lay the upper triangles of the named weights' Gram matrices out."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name in shapes or name not in layout or len(layout[name].shape) != 2:
            raise LayoutError(
                f"Gram matrix of {str(name)[:80]!r}: no Linear weight of the delta group, or named "
                "twice"
            )
        width = layout[name].shape[1]
        shapes[name] = (width * (width + 1) // 2,)
    if not shapes:
        raise LayoutError("no Gram matrix of a Linear of the delta group is there")
    return layout_of(shapes)


def _width(size: int) -> int:
    """The width w of a triangle of w·(w+1)/2 elements."""
    return (int((8 * size + 1) ** 0.5) - 1) // 2


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "fisher": Kind(_survivors, _fisher_values, _read_fisher),
        "gram": Kind(_whole, _gram_vector, _read_grams),
    }
)
