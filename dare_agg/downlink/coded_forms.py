"""Steps in a value format of the codec, rounded to the grid by whoever decodes them.

**dense**: every element; **union**: the elements that any mask of the round keeps; **dare**:
one stratified mask of the step's own, rescaled by the receiver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dare_agg.codec.payload import PayloadReader, PayloadWriter, encode_payload
from dare_agg.downlink.grid import TILE, Positions, VersionGrid
from dare_agg.downlink.step_form import Families, Family, Settled, StepForm, StepHead
from dare_agg.errors import UpdateError
from dare_agg.vectors.layout import FloatVector

# Yields (positions, rescale), ascending, once for each tile of `TILE`.
Places = Callable[[Families, Sequence[int]], Iterator[tuple[Positions, FloatVector | np.float32]]]
_ONE = np.float32(1)


def coded_form(name: str, code: int, places: Places, **words: Any) -> StepForm:
    """A form whose values lie where ``places`` says."""

    def encode(head: StepHead, change: FloatVector, grid: VersionGrid) -> tuple[bytes, int]:
        # Twice over the masks, tile by tile: the values of a union of many clients, held at
        # once, would be a good part of the server's memory.
        count = sum(positions.size for positions, _ in places(head.families, grid.layout.sizes))
        pieces = (change[positions] for positions, _ in places(head.families, grid.layout.sizes))
        return encode_payload(head.values, pieces, count, head.key), count

    def decode(
        head: StepHead, payload: bytes, grid: VersionGrid
    ) -> Iterator[tuple[Positions, Positions]]:
        # The number of values is bounded by the model before anything is decoded.
        if head.survivors > grid.size:
            raise UpdateError(
                f"step of {head.survivors} values for {grid.size} parameters", reason="shape"
            )
        values = PayloadReader(head.values, payload, head.survivors, head.key)
        for positions, scale in places(head.families, grid.layout.sizes):
            yield positions, grid.round_at(positions, values.take(positions.size) * scale)
        if values.left:
            raise UpdateError("step holds more values than its masks keep", reason="mask")

    def write(head: StepHead, grid: VersionGrid) -> _CodedWriter:
        return _CodedWriter(head, grid, places(head.families, grid.layout.sizes))

    return StepForm(name, code, encode, decode, write, **words)


class _CodedWriter:
    """Values wait until their group is full, and with them where they belong."""

    def __init__(
        self,
        head: StepHead,
        grid: VersionGrid,
        places: Iterator[tuple[Positions, FloatVector | np.float32]],
    ) -> None:
        self._payload = PayloadWriter(head.values, head.key)
        self._grid, self._places = grid, places
        self._next: tuple[Positions, FloatVector | np.float32] = (np.empty(0, np.int64), _ONE)
        self._waiting: list[tuple[Positions, FloatVector, FloatVector | np.float32]] = []

    @property
    def count(self) -> int:
        return self._payload.count

    def places(self) -> Positions:
        self._next = next(self._places)
        return self._next[0]

    def add(self, change: FloatVector) -> Iterator[Settled]:
        positions, scale = self._next
        self._waiting.append((positions, change, scale))
        for decoded in self._payload.add(change):
            yield self._settle(decoded)

    def finish(self) -> Iterator[Settled]:
        for decoded in self._payload.finish():
            yield self._settle(decoded)

    def payload(self) -> bytes:
        return self._payload.payload()

    def _settle(self, decoded: FloatVector) -> Settled:
        """Match a decoded group with the places that its values came from."""
        positions = np.empty(decoded.size, np.int64)
        change = np.empty(decoded.size, np.float32)
        at = 0
        while at < decoded.size:
            where, values, scale = self._waiting[0]
            size = min(where.size, decoded.size - at)
            positions[at : at + size], change[at : at + size] = where[:size], values[:size]
            if scale is not _ONE:
                decoded[at : at + size] *= scale[:size] if isinstance(scale, np.ndarray) else scale
            at += size
            rest = scale[size:] if isinstance(scale, np.ndarray) else scale
            self._waiting[:1] = [(where[size:], values[size:], rest)] if size < where.size else []
        return positions, change, self._grid.round_at(positions, decoded)


def _everywhere(
    _: Families, sizes: Sequence[int]
) -> Iterator[tuple[Positions, FloatVector | np.float32]]:
    size = sum(sizes)
    for lo in range(0, size, TILE):
        yield np.arange(lo, min(size, lo + TILE), dtype=np.int64), _ONE


def on_any_mask(
    families: Families, sizes: Sequence[int]
) -> Iterator[tuple[Positions, FloatVector | np.float32]]:
    """Yield the places that any mask keeps, of tensors of these sizes."""
    masks = [mask for family in families for mask in family.masks(sizes)]
    size = sum(sizes)
    for lo in range(0, size, TILE):
        hi = min(size, lo + TILE)
        kept = np.zeros(hi - lo, np.bool_)
        for mask in masks:
            kept[mask.indices(lo, hi) - lo] = True
        yield np.flatnonzero(kept) + lo, _ONE


def _on_one_mask(
    families: Families, sizes: Sequence[int]
) -> Iterator[tuple[Positions, FloatVector | np.float32]]:
    mask, size = families[0].masks(sizes)[0], sum(sizes)
    for lo in range(0, size, TILE):
        # What a mask yields may be reused by its next step.
        found = [(at.copy(), scale) for _, at, scale in mask.within(lo, lo + TILE)]
        positions = np.concatenate([at for at, _ in found] or [np.empty(0, np.int64)])
        scales = [np.broadcast_to(scale, at.shape) for at, scale in found]
        yield positions, np.concatenate(scales or [np.empty(0, np.float32)])


DENSE = coded_form("dense", 1, _everywhere)
UNION = coded_form(
    "union", 0, on_any_mask, masks=lambda families, rate, key: families, masked=True, dense=DENSE
)
DARE = coded_form(
    "dare",
    2,
    _on_one_mask,
    masks=lambda families, rate, key: (Family("stratified", rate, 0, 1, key),),
    masked=True,
    dense=DENSE,
)
