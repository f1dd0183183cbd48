"""Tensors that files name differently and that are one parameter once transformers has loaded them.

transformers 5 renames tensors of many architectures on its way from disk into memory. A state dict
that a trainer saved as it lay in memory, or a file of another version, has other names than BASE's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dare_agg.checkpoint import Checkpoint
from dare_agg.offline.adapters.memory import names_in_memory
from dare_agg.vectors.wrappers import unwrapped


def names_alike_in_memory(
    model: Checkpoint, base: Checkpoint, names: Mapping[str, str]
) -> dict[str, str]:
    """Return which of BASE's tensors are MODEL's further ones, beside the ``names`` found before.

    Both are read as BASE's configuration says; empty where there is none, without transformers,
    and for what is stacked or split on the way.
    """
    lost = {unwrapped(n): n for n, info in model.tensors.items() if names and info.is_float}
    lost = {short: own for short, own in lost.items() if own not in names}
    missing = {n for n, info in base.tensors.items() if info.is_float} - set(names.values())
    if not lost or not missing:
        return {}
    tensors = {unwrapped(n): info for n, info in model.tensors.items()}
    wanted = [[name] for name in lost]
    mine = _whole(replace(model, path=base.path, tensors=tensors), wanted)
    found: dict[str, str] = {}
    for name, tensor in _whole(base, wanted).items() if mine else ():
        own = lost.get(mine.get(name, ""))
        if own and tensor in missing and model.tensors[own].shape == base.tensors[tensor].shape:
            found[own] = tensor
    return found


def _whole(checkpoint: Checkpoint, wanted: list[list[str]]) -> dict[str, str]:
    """The tensor of each parameter in memory that is one tensor on disk."""
    return {
        name: pieces[0].tensor
        for name, pieces in names_in_memory(checkpoint, {}, wanted).items()
        if len(pieces) == 1 and pieces[0].hi is None
    }
