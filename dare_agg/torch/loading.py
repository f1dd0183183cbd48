"""A version of the global model put into a torch model's own tensors, tile by tile."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from dare_agg.torch.places import Held, check_holds_values, over_tiles, put, same_memory
from dare_agg.vectors.model import GlobalModel
from dare_agg.vectors.rounded import rounded_model
from dare_agg.vectors.sources import ArraySource, DeltaSource
from dare_agg.vectors.tiled import AnyVector, TiledVector


def load_into(version: GlobalModel, parts: Mapping[str, Held]) -> GlobalModel:
    """Overwrite tensors, by their names in the global model, with a version of it, in place.

    Copies of a tied tensor that are tensors of their own get its values too. Returns the version
    as the tensors hold it, which is what training begins from.

    Raises `LayoutError` for a dtype or a device that cannot hold a version, `NonFiniteError` for a
    value that is too large for float16.
    """
    held_version = as_held(version, parts)
    # Tensors round what is put into them; only float16 has to be looked at before.
    coarse = any(part.local.dtype == torch.float16 for part in parts.values())
    layout = version.groups.layout
    vector = as_source((held_version if coarse else version).delta)
    with torch.no_grad():
        for _, part, places, _, values in over_tiles(layout, parts, vector):
            put(part.local, places, values)
        for first, part in _copies(version, parts):
            for _, _, places, _, values in over_tiles(layout, {first: part}, vector, layout[first]):
                put(part.local, places, values)
        for name, part in parts.items():
            array = _small_array(held_version, name)
            if array is not None:
                place(part, array)
    return held_version


def as_held(version: GlobalModel, parts: Mapping[str, Held]) -> GlobalModel:
    """The version as tensors of their dtypes hold it, nothing copied; raises as `load_into`."""
    groups, words = version.groups, {}
    for name, part in parts.items():
        own = groups.copies.get(name, name)
        if own in groups.layout or (own in groups.dense_layout and own not in groups.integers):
            check_holds_values(name, part.local)
            words[own] = str(part.local.dtype).removeprefix("torch.")
    return rounded_model(version, words)


def as_source(vector: AnyVector) -> DeltaSource:
    """A vector in memory or elsewhere as a source."""
    return vector if isinstance(vector, TiledVector) else ArraySource(vector)


def _copies(version: GlobalModel, parts: Mapping[str, Held]) -> list[tuple[str, Held]]:
    """Copies of tied tensors that lie in memory of their own, by the name that stands for them."""
    return [
        (first, parts[name])
        for name, first in version.groups.copies.items()
        if name in parts and first in version.groups.layout
        if first not in parts or not same_memory(parts[name], parts[first])
    ]


def _small_array(version: GlobalModel, name: str) -> NDArray[np.generic] | None:
    """What the version says of a tensor that travels whole, or has in its first state alone."""
    own = version.groups.copies.get(name, name)
    if own in version.groups.dense_layout:
        entry = version.groups.dense_layout[own]
        piece = version.dense[entry.offset : entry.stop].reshape(entry.shape)
        return version.groups.from_vector(own, piece)
    return version.local.get(own)


def place(part: Held, array: NDArray[np.generic]) -> None:
    """Overwrite a part with its box of a whole array, which has as many elements as the tensor."""
    whole = np.array(array).reshape(part.whole)
    box = zip(part.start, part.local.shape, strict=True)
    here = whole[tuple(slice(start, start + size) for start, size in box)]
    values = torch.from_numpy(np.ascontiguousarray(here).reshape(tuple(part.local.shape)))
    with torch.no_grad():
        part.local.copy_(values)
