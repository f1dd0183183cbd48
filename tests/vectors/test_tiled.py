"""A vector that lies elsewhere is read in slices, and a model over it is named as one in memory."""

import numpy as np
import pytest

from dare_agg.downlink.grid import TILE, grid_of
from dare_agg.rounds.noise import norm_of
from dare_agg.vectors.model import global_model
from dare_agg.vectors.sources import array_source
from dare_agg.vectors.tiled import TiledVector, tiles


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(3)
    return {
        "b.weight": draw.normal(size=(TILE // 512, 1024)).astype(np.float32),
        "a.weight": draw.normal(size=(70, 33)).astype(np.float32),
        "bn.running_var": np.ones(7, np.float32),
        "head": np.ones(3, np.float32),
    }


def test_slices_and_positions_are_the_vectors_own() -> None:
    vector = np.arange(100, dtype=np.float32)
    tiled = TiledVector(array_source(vector))
    assert tiled.shape == vector.shape
    assert np.array_equal(tiled[3:9], vector[3:9])
    assert np.array_equal(tiled[90:], vector[90:])
    assert tiled[50:50].size == 0
    assert np.array_equal(tiled.take(np.array([0, 7, 99])), [0, 7, 99])
    assert np.array_equal(np.concatenate([p for _, p in tiles(tiled, 7)]), vector)
    with pytest.raises(ValueError, match="step 2"):
        tiled[::2]


def test_a_model_on_disk_is_the_model_in_memory(arrays: dict[str, np.ndarray]) -> None:
    model = global_model(arrays, exclude=["head"])
    elsewhere = model.placed(TiledVector(array_source(model.delta[:])), model.dense)
    assert elsewhere.ref == model.ref
    assert norm_of(elsewhere.delta) == norm_of(model.delta)
    grid = grid_of(model.groups.layout, elsewhere.delta)
    assert grid == grid_of(model.groups.layout, model.delta)
    found = elsewhere.arrays()
    assert list(found) == list(arrays)
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    moved = elsewhere.moved(np.ones(model.delta.size, np.float32), None)
    assert np.array_equal(moved.delta[:], model.delta[:] + np.float32(1))


def test_a_part_of_a_version_is_the_whole_versions_part(arrays: dict[str, np.ndarray]) -> None:
    arrays["a.weight"] = arrays["a.weight"].astype(np.float16)
    model = global_model(arrays, exclude=["head"])
    groups = model.groups
    grid = grid_of(groups.layout, model.delta, groups.dtypes)
    counts = np.random.default_rng(1).integers(-9999, 9999, grid.size).astype(np.int16)
    whole = grid.values(model.delta[:], counts.astype(np.int32))
    lo, hi = 2000, TILE + 17
    part = np.array(model.delta[lo:hi])
    grid.move(lo, part, counts[lo:hi])
    assert np.array_equal(part, whole[lo:hi])
    places = np.arange(5, grid.size, 911)
    assert np.array_equal(
        grid.moved_at(places, model.delta[:].take(places), counts[places]), whole[places]
    )
