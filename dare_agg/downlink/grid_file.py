"""A base's grid, kept in a file: to make it anew the whole base has to be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dare_agg.downlink.grid import VersionGrid, grid_from, grid_of
from dare_agg.downlink.kept_files import try_to
from dare_agg.errors import StateError
from dare_agg.files.state_file import read_state, write_state
from dare_agg.vectors.model import GlobalModel

_EXPONENTS = "exponents"


def kept_grid(path: Path, base: GlobalModel, version: str) -> VersionGrid:
    """The grid of a base's delta group, from the file at ``path`` where that is of ``version``.

    It is made and kept otherwise. Raises `NonFiniteError` for a base that is not finite.
    """
    layout, dtypes = base.groups.layout, base.groups.dtypes
    facts = {"base": version, "layout": layout.fingerprint}
    try:
        arrays, found = read_state(path)
        kept = arrays.get(_EXPONENTS, np.empty(0))
        if found == facts and kept.shape == (len(layout.entries),) and kept.dtype == np.int32:
            return grid_from(layout, kept.tolist(), dtypes)
    except StateError:
        pass
    grid = grid_of(layout, base.delta, dtypes)
    exponents = np.array(grid.exponents, np.int32)
    try_to(lambda: write_state(path, {_EXPONENTS: exponents}, facts))
    return grid
