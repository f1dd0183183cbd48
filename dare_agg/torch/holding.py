"""A model that holds a version of the global model, and what training made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dare_agg.codec.update import encode_update
from dare_agg.errors import ApartError
from dare_agg.rounds.client import (
    ClientUpdate,
    Measured,
    check_start,
    completed_update,
    settled_spec,
)
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.same_code import check_same_code
from dare_agg.rounds.statistics import Statistics
from dare_agg.torch.delta import TrainedDelta
from dare_agg.torch.loading import as_source, load_into, place
from dare_agg.torch.named import matched_tensors, named_tensors
from dare_agg.torch.places import TILE, Held, held, picked, same_memory
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.model import Arrays, GlobalModel
from dare_agg.vectors.patterns import compile_patterns, matches
from dare_agg.vectors.tied import sets_of


@dataclass(frozen=True)
class HeldModel:
    """A torch model that a version was loaded into; ``start`` is that as the tensors hold it."""

    model: nn.Module
    start: GlobalModel
    exclude: tuple[str, ...] = ()

    def update(self, plan: RoundPlan, statistics: Statistics | None = None) -> ClientUpdate:
        """Turn what training made of the model into the update that the plan asks for.

        Tensors are looked up anew: trainers may have put others in their place. Raises as
        `dare_agg.rounds.client.client_update`, and `ApartError` for copies of a tied tensor that
        training moved apart.
        """
        check_same_code(plan.codec, plan.package, "the round plan", "this client")
        check_start(plan, self.start)
        tensors = self.tensors()
        parts = {name: held(tensor) for name, tensor in tensors.items()}
        check_tied(self.start, parts)
        layout = self.start.groups.layout
        delta = TrainedDelta(layout, parts, as_source(self.start.delta))
        found = delta.measure()
        measured = Measured(found.norm, found.largest, found.above / layout.size)
        blob = encode_update(settled_spec(plan, layout, delta), delta)
        dense = dense_vector(self.start, tensors)
        return completed_update(plan, self.start, blob, dense, measured, statistics, delta)

    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors as they are now, by their names in the global model."""
        return matched_tensors(self.start.groups, named_tensors(self.model), self.exclude)

    def own_tensors(self) -> dict[str, NDArray[Any]]:
        """The tensors that stay with this client (heads, buffers), as they are now."""
        local, patterns = set(self.start.groups.local), compile_patterns(self.exclude)
        return {
            name: whole_array(tensor)
            for name, tensor in self.tensors().items()
            if name in local or matches(name, patterns)
        }


def hold(
    model: nn.Module, version: GlobalModel, own: Arrays, exclude: tuple[str, ...] = ()
) -> HeldModel:
    """Load a version, and this client's ``own`` tensors over it, into a model, in place.

    Raises `LayoutError` for another model, or one that cannot hold the version (`load_into`).
    """
    tensors = matched_tensors(version.groups, named_tensors(model), exclude)
    parts = {name: held(tensor) for name, tensor in tensors.items()}
    start = load_into(version, parts)
    for name, array in own.items():
        if name in parts and parts[name].whole == array.shape:
            place(parts[name], array)
    return HeldModel(model, start, exclude)


def check_tied(start: GlobalModel, parts: Mapping[str, Held]) -> None:
    """Raise `ApartError` where copies of a tied tensor, each with memory of its own, differ."""
    apart: list[tuple[str, str]] = []
    for names in sets_of(start.groups.copies).values():
        there = [name for name in names if name in parts]
        apart += [
            (there[0], name)
            for name in there[1:]
            if not same_memory(parts[there[0]], parts[name])
            and not _equal(parts[there[0]].local, parts[name].local)
        ]
    if apart:
        raise ApartError(
            f"tensors {apart[0][0]!r} and {apart[0][1]!r} are one in the global model, and "
            "training moved them apart; name one of them in 'dense' to keep them two",
            [name for _, name in apart],
        )


def dense_vector(start: GlobalModel, tensors: Mapping[str, Tensor]) -> FloatVector:
    """The dense group as the model holds it now; of what the model lacks, as it began."""
    layout, begun = start.groups.dense_layout, start.arrays()
    return start.groups.flatten_dense(
        {
            name: whole_array(tensors[name]).reshape(layout[name].shape)
            if name in tensors
            else begun[name]
            for name in layout.names
        }
    )


def whole_array(tensor: Tensor) -> NDArray[Any]:
    """A (small) tensor's values in the host's memory; floating point as float32.

    Of a sharded one all processes must ask.
    """
    full: Any = tensor.detach()
    if hasattr(full, "full_tensor"):
        full = full.full_tensor()
    full = full.cpu()
    return np.array(full.float() if full.is_floating_point() else full)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, compared tile by tile where the first lies."""
    if one.shape != other.shape:
        return False
    return all(
        torch.equal(picked(one, part).float(), picked(other, part).to(one.device).float())
        for part in _slices(one.numel())
    )


def _slices(size: int) -> Iterator[slice]:
    for lo in range(0, size, TILE):
        yield slice(lo, min(size, lo + TILE))
