"""A version of a model written as the checkpoint that its base is, tile by tile."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dare_agg.checkpoint.carried import Carried, carry_files
from dare_agg.checkpoint.reader import Checkpoint, parse_dtype
from dare_agg.checkpoint.stated_dtype import state_dtype
from dare_agg.checkpoint.writer import CheckpointWriter, plan_like
from dare_agg.vectors.layout import Entry, FloatVector
from dare_agg.vectors.model import GlobalModel
from dare_agg.vectors.tiled import TILE, AnyVector


def write_like_base(
    base: Checkpoint,
    model: GlobalModel,
    out: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Carried:
    """Write ``model``, a version of ``base``, with that one's names, shards and other files.

    Values are rounded to the dtype that each tensor has in the base, or to ``dtype``
    ("float32", which holds them all, "bfloat16", "float16"), and ``config.json`` says so. What
    never leaves a client is the base's. ``out`` is a folder, or a ``.safetensors`` file, and
    appears whole or not at all. Returns which other files went along.

    Raises `CheckpointError` for a place that cannot be written to and an unknown dtype,
    `NonFiniteError` for a value too large for its dtype.
    """
    groups = model.groups
    floats = {name for name, info in base.tensors.items() if info.is_float}
    found: dict[str, tuple[Entry, AnyVector]] = {}
    for layout, vector in ((groups.layout, model.delta), (groups.dense_layout, model.dense)):
        found.update({entry.name: (entry, vector) for entry in layout.entries})
    own = {name: groups.copies.get(name, name) for name in base.names}
    moved = {name for name in base.names if own[name] in found}
    word = None if dtype is None else parse_dtype(dtype)
    plans = plan_like(base, out, moved & floats, word)
    with CheckpointWriter(out, plans, {"format": "pt"}, overwrite) as writer:
        for name in base.names:
            if name not in moved:
                writer.write_raw(name, 0, base.raw(name))
                continue
            entry, vector = found[own[name]]
            if name in floats:
                _write_tiles(writer, name, entry, vector)
            else:
                piece = np.array(vector[entry.offset : entry.stop])
                writer.write_raw(name, 0, groups.from_vector(own[name], piece))
        carried = Carried()
        if base.folder is not None and not writer.single:
            carried = carry_files(base.folder, writer.folder, skip=base.weights)
            state_dtype(writer.folder, plans)
    return carried


def _write_tiles(writer: CheckpointWriter, name: str, entry: Entry, vector: AnyVector) -> None:
    for lo in range(entry.offset, entry.stop, TILE):
        tile: FloatVector = vector[lo : min(entry.stop, lo + TILE)]
        writer.write(name, lo - entry.offset, tile)


__all__ = ["write_like_base"]
