"""Which elements of a tensor lie here: all of a plain one, a box of a sharded one (DTensor)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dare_agg.errors import LayoutError
from dare_agg.vectors.layout import Entry, FloatVector, Layout
from dare_agg.vectors.rounded import PARAMETER_DTYPES
from dare_agg.vectors.sources import DeltaSource, Positions

# Elements gone over at a time: 2 MiB of values.
TILE = 1 << 19


@dataclass(frozen=True)
class Held:
    """The part of a tensor that lies in this process: a box of its elements, or all of them.

    ``start`` is the box's first corner within ``whole``, the tensor's shape; ``speaks`` is False
    for a copy of what another process answers for.
    """

    local: Tensor
    whole: tuple[int, ...]
    start: tuple[int, ...]
    speaks: bool = True

    @property
    def size(self) -> int:
        """Number of elements in the box."""
        return self.local.numel()

    @cached_property
    def run(self) -> tuple[int, int] | None:
        """First and last (exclusive) flat element, where the box is one run of them."""
        shape = tuple(self.local.shape)
        if not self.size or not shape:
            return 0, self.size
        if shape[1:] != self.whole[1:]:
            return None
        inner = self.size // shape[0]
        return self.start[0] * inner, (self.start[0] + shape[0]) * inner

    def find(self, index: Positions) -> tuple[slice | NDArray[np.int64], Positions]:
        """Which of some ascending flat elements of the tensor lie here, and where in the box."""
        if self.run is not None:
            lo, hi = (int(n) for n in np.searchsorted(index, self.run))
            return slice(lo, hi), index[lo:hi] - self.run[0]
        corner = np.array(self.start)[:, None]
        at = np.array(np.unravel_index(index, self.whole)) - corner
        shape = tuple(self.local.shape)
        inside = ((at >= 0) & (at < np.array(shape)[:, None])).all(axis=0)
        return np.flatnonzero(inside), np.ravel_multi_index(tuple(at[:, inside]), shape)


# A tensor's name, its part here, places in the part's box, the tensor's flat elements that stand
# there, and values for them.
Piece = tuple[str, Held, slice | Positions, slice | Positions, FloatVector]


def over_tiles(
    layout: Layout,
    parts: Mapping[str, Held],
    values: DeltaSource,
    within: Entry | None = None,
) -> Iterator[Piece]:
    """Go over a vector (one tensor of it) and the parts of its tensors that lie here, by tiles.

    Every process of a sharded model reads the same tiles in the same order.
    """
    start, stop = (0, layout.size) if within is None else (within.offset, within.stop)
    for lo in range(start, stop, TILE):
        hi = min(stop, lo + TILE)
        found = np.empty(hi - lo, np.float32)
        values.read(lo, hi, found)
        for entry, first, last in layout.pieces(lo, hi):
            part = parts.get(entry.name)
            if part is None or not part.size:
                continue
            piece = found[entry.offset + first - lo : entry.offset + last - lo]
            if part.run is None:
                elements = np.arange(first, last)
                kept, places = part.find(elements)
                yield entry.name, part, places, elements[kept], piece[kept]
                continue
            begin, end = max(first, part.run[0]), min(last, part.run[1])
            if begin < end:
                box = slice(begin - part.run[0], end - part.run[0])
                values_here = piece[begin - first : end - first]
                yield entry.name, part, box, slice(begin, end), values_here


def held(tensor: Tensor, leads: bool = True) -> Held:
    """What of a tensor lies in this process; for plain ones, the process that ``leads`` answers.

    Raises `LayoutError` for a DTensor that is no box here (partial sums, strided shards).
    """
    if not is_sharded([tensor]):
        shape = tuple(tensor.shape)
        return Held(tensor.detach(), shape, (0,) * len(shape), leads)
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    placements, mesh = sharded.placements, sharded.device_mesh
    for placement in placements:
        if type(placement) not in (Shard, Replicate):
            raise LayoutError(
                f"a tensor is placed as {placement}; boxes and copies of them can be read: shard "
                "with fully_shard alone, or with replicas (HSDP)"
            )
    whole = tuple(sharded.shape)
    shape, start = compute_local_shape_and_global_offset(whole, mesh, placements)
    local = sharded.detach().to_local()
    if tuple(local.shape) != tuple(shape):
        raise LayoutError(f"a shard of shape {tuple(local.shape)} lies where {tuple(shape)} is due")
    place = mesh.get_coordinate() or ()
    copies = [at for at, kind in zip(place, placements, strict=True) if type(kind) is Replicate]
    return Held(local, whole, tuple(start), not any(copies))


def same_memory(one: Held, other: Held) -> bool:
    """Whether two parts are one tensor under two names."""
    a, b = one.local, other.local
    return a is b or (a.device == b.device and a.data_ptr() == b.data_ptr() and a.numel() > 0)


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of some tensors lies in pieces over processes."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def check_holds_values(name: str, tensor: Tensor) -> None:
    """Raise `LayoutError` for a tensor whose dtype or device cannot hold a version's values."""
    word = str(tensor.dtype).removeprefix("torch.")
    if word not in PARAMETER_DTYPES:
        raise LayoutError(
            f"the model's tensor {name!r} is {word}, which cannot hold a version's values: load "
            "the model as float32, bfloat16 or float16, or federate an adapter over it (PEFT)"
        )
    if tensor.device.type == "meta":
        raise LayoutError(
            f"the model's tensor {name!r} is on the device meta, which holds no values: load the "
            "model without offloading to disk or CPU (no device_map, or one of real devices)"
        )


def on(values: NDArray, device: torch.device) -> Tensor:
    """Numbers on a device; on the CPU the array itself, nothing copied."""
    return torch.from_numpy(values).to(device)


def picked(tensor: Tensor, places: Tensor | Positions | slice) -> Tensor:
    """Elements of a tensor at flat places, in its dtype, on its device.

    A tensor that is no run in memory is not laid out anew for it.
    """
    if isinstance(places, slice):
        if tensor.is_contiguous():
            return tensor.view(-1)[places]
        places = np.arange(places.start, places.stop)
    if not isinstance(places, Tensor):
        places = on(places, tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1).index_select(0, places)
    return tensor[torch.unravel_index(places, tensor.shape)]


def put(tensor: Tensor, places: Positions | slice, values: FloatVector) -> None:
    """Overwrite elements of a tensor at flat places, rounded to its dtype, in place."""
    if isinstance(places, slice):
        if tensor.is_contiguous():
            tensor.view(-1)[places].copy_(torch.from_numpy(values))
            return
        places = np.arange(places.start, places.stop)
    there = on(places, tensor.device)
    numbers = on(values, tensor.device).to(tensor.dtype)
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, there, numbers)
    else:
        tensor[torch.unravel_index(there, tensor.shape)] = numbers
