"""Training for an update that is known beforehand: only what will survive learns.

A drop that comes after training adds noise, and at p = .99 on a large delta that noise is the
model's end. Masks follow from a key, so that they can be drawn first: then nothing is dropped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.formats import find_values
from dare_agg.codec.mask import DropRate, parse_drop_rate
from dare_agg.codec.update import UpdateSpec
from dare_agg.codec.update_file import FileHeader, write_update_file
from dare_agg.errors import LayoutError
from dare_agg.torch.named import named_tensors
from dare_agg.torch.places import is_sharded
from dare_agg.vectors.layout import FingerprintStream, FloatVector, Layout, layout_of
from dare_agg.vectors.sources import Positions

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Elements that are on the host at a time.
_TILE = 1 << 20


@dataclass(frozen=True)
class LearnedSurvivors:
    """A model of which only the survivors of one update learn.

    ``places`` are theirs in the layout, ``begun`` their values before training, ``base`` is the
    fingerprint of the whole model then.
    """

    model: nn.Module
    layout: Layout
    drop_rate: DropRate
    seed: int
    base: str
    places: Positions
    begun: FloatVector

    def write(
        self, out: str | os.PathLike[str], *, values: str = "b2", overwrite: bool = False
    ) -> FileHeader:
        """Write the update that leads from the model as it began to what it has learned.

        Survivors travel unscaled in the value format ``values``; ``dare-agg apply`` and ``merge``
        read the file as any other. Raises `LayoutError` where anything else moved, too,
        `NonFiniteError` for a survivor that is no number.
        """
        find_values(values)
        tensors = _parameters(self.model)
        now = _gathered(tensors, self.layout, self.places)
        if _fingerprint(tensors, self.layout, self.places, self.begun) != self.base:
            raise LayoutError(
                "parameters outside the mask moved since training began, and the update would not "
                "hold them: set weight_decay to 0, change parameters by their gradients alone, or "
                "name tensors that are sent otherwise in exclude"
            )
        spec = _spec(self.layout, self.drop_rate, self.seed, values, self.base)
        source = _Changes(self.layout.size, self.places, now - self.begun)
        dtypes = {entry.name: _DTYPES[tensors[entry.name].dtype] for entry in self.layout.entries}
        return write_update_file(
            Path(out), spec, self.layout, source, seed=self.seed, dtypes=dtypes, overwrite=overwrite
        )


@contextmanager
def learn_survivors(
    model: nn.Module,
    *,
    drop_rate: float | str = "0.99",
    seed: int = 0,
    exclude: Iterable[str] = (),
) -> Iterator[LearnedSurvivors]:
    """Let only one in 1/(1−p) parameters of a model learn: those that an update of it will hold.

    Within the block gradients of all others are zero; the layout is that of the trainable
    parameters, by their names in files, tied ones once. ``exclude`` are regular expressions of
    names that learn as they are and are no part of the update, such as a new head. Few elements
    have to go further than all would: multiply the learning rate by about 2·√(1/(1−p)). Weight
    decay has to be 0.

    Raises `LayoutError` for a model without such parameters, or with sharded ones.

    >>> model = nn.Linear(100, 10, bias=False)
    >>> with learn_survivors(model, drop_rate="0.99") as kept:
    ...     model(torch.ones(1, 100)).sum().backward()
    >>> int(torch.count_nonzero(model.weight.grad)), len(kept.places)
    (10, 10)
    """
    rate = parse_drop_rate(drop_rate)
    tensors = _parameters(model)
    if is_sharded(tensors.values()):
        raise LayoutError(
            "the model is sharded over processes, and masks are drawn for whole tensors; train it "
            "in one process, or use federated_model"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layout = layout_of(shapes, exclude=exclude)
    if not layout.size:
        raise LayoutError("no trainable parameter is left for the update; exclude less")
    strange = [n for n in layout.names if tensors[n].dtype not in _DTYPES]
    if strange:
        raise LayoutError(
            f"parameter {strange[0]!r} is {tensors[strange[0]].dtype}; float32, bfloat16 and "
            "float16 can be sent: convert it, or name it in exclude"
        )
    places = _spec(layout, rate, seed, "f32", "00" * 32).draw_mask().indices(0, layout.size)
    base = _fingerprint(tensors, layout)
    begun = _gathered(tensors, layout, places)
    handles = [
        tensors[entry.name].register_hook(_only(places, entry.offset, entry.stop))
        for entry in layout.entries
    ]
    try:
        yield LearnedSurvivors(model, layout, rate, seed, base, places, begun)
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Changes:
    """A delta that is zero but at some places."""

    size: int
    places: Positions
    values: FloatVector

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        first, last = np.searchsorted(self.places, (lo, hi))
        out[:] = 0
        out[self.places[first:last] - lo] = self.values[first:last]

    def take(self, positions: Positions) -> FloatVector:
        return self.values[np.searchsorted(self.places, positions)]


def _spec(layout: Layout, rate: DropRate, seed: int, values: str, base: str) -> UpdateSpec:
    secret = seed_secret(seed)
    return UpdateSpec(
        size=layout.size,
        drop_rate=rate,
        mask="stratified",
        mask_key=derive_key(secret, "survivors mask"),
        values_key=derive_key(secret, "survivors values"),
        rank=0,
        values=values,
        base=base,
        layout=layout.fingerprint,
        rescale=False,
    )


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by their names in files, a tied one by the first of its names."""
    named = named_tensors(model)
    first: dict[int, str] = {}
    for name in sorted(named, key=str.encode):
        first.setdefault(id(named[name]), name)
    return {
        name: tensor
        for name, tensor in named.items()
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad and first[id(tensor)] == name
    }


def _only(places: Positions, first: int, stop: int) -> Callable[[Tensor], Tensor]:
    """What keeps of a gradient the elements at ``places`` alone; the tensor is [first, stop)."""
    lo, hi = np.searchsorted(places, (first, stop))
    own = torch.from_numpy(places[lo:hi] - first)

    def hook(gradient: Tensor) -> Tensor:
        at = own.to(gradient.device)
        kept = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
        kept.view(-1)[at] = gradient.reshape(-1)[at]
        return kept

    return hook


def _gathered(tensors: Mapping[str, Tensor], layout: Layout, places: Positions) -> FloatVector:
    """The values at some places of the layout, in float32 on the host."""
    found = np.empty(places.size, np.float32)
    for entry in layout.entries:
        lo, hi = np.searchsorted(places, (entry.offset, entry.stop))
        tensor = tensors[entry.name].detach()
        at = torch.from_numpy(places[lo:hi] - entry.offset).to(tensor.device)
        found[lo:hi] = tensor.reshape(-1)[at].float().cpu().numpy()
    return found


def _fingerprint(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    places: Positions | None = None,
    values: FloatVector | None = None,
) -> str:
    """The fingerprint of a model, with these ``values`` at ``places`` where they are given."""
    stream = FingerprintStream(layout)
    for entry in layout.entries:
        flat = tensors[entry.name].detach().reshape(-1)
        for lo in range(0, entry.size, _TILE):
            piece = flat[lo : lo + _TILE].float().cpu().numpy()
            if places is not None and values is not None:
                start = entry.offset + lo
                first, last = np.searchsorted(places, (start, start + piece.size))
                piece = piece.copy()
                piece[places[first:last] - start] = values[first:last]
            stream.update(piece)
    return stream.hexdigest()
