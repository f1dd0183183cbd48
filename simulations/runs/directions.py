"""A delta's directions as they arrive beside an update, with the bits that they took.

The exact ones of a language model take a minute to find, so they are kept in a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dare_agg.codec.directions import (
    decode_directions,
    encode_directions,
    gram_values,
    plan_directions,
)
from dare_agg.files.atomic import replace_file
from dare_agg.merge.directions import directions_of
from dare_agg.merge.linears import model_linears
from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.sources import array_source

Directions = Mapping[str, FloatVector]


def kept_directions(path: Path, layout: Layout, delta: FloatVector, rank: int) -> Directions:
    """The ``rank`` leading directions of every Linear; the file at ``path``, made if missing."""
    from safetensors.numpy import load_file, save

    if not path.is_file():
        found = directions_of(array_source(delta), model_linears(layout), rank)
        arrays = {name: np.asarray(rows, np.float32) for name, rows, _ in found}
        replace_file(path, (save(arrays),))
    return load_file(str(path))


def sent_directions(
    exact: Directions, layout: Layout, rank: int, bits: int, key: bytes
) -> tuple[Directions, int]:
    """Return the first ``rank`` directions of each layer as they arrive, and their bits in all."""
    linears = model_linears(layout)
    found = {
        name: (rows[:rank], 0 if linears[name].transposed else 1) for name, rows in exact.items()
    }
    plan = plan_directions(layout, found, gram_values(bits))
    section = encode_directions(layout, plan, found, key, b"")
    arrived = decode_directions(plan, layout, memoryview(section), key, b"")
    return arrived.decoded(), 8 * len(section)
