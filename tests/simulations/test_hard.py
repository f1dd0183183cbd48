"""Ways of sending a delta in few bytes: what they cost, and what they bring."""

import numpy as np
import pytest

from dare_agg.errors import ConfigError
from dare_agg.vectors.layout import layout_of
from simulations.runs.hard import WAYS, arrived

LAYOUT = layout_of({"a": (200, 100), "b": (300,), "c": (40, 10, 20)})


def delta_of(noise: float) -> np.ndarray:
    random = np.random.default_rng(0)
    named = {
        "a": random.normal(size=(200, 3)) @ random.normal(size=(3, 100)),
        "b": np.full(300, 0.1),
        "c": (random.normal(size=(40, 2)) @ random.normal(size=(2, 200))).reshape(40, 10, 20),
    }
    delta = LAYOUT.flatten({name: array.astype(np.float32) for name, array in named.items()})
    return delta + np.float32(noise) * random.normal(size=delta.size).astype(np.float32)


def error(moved: np.ndarray, delta: np.ndarray) -> float:
    return float(np.square(moved - delta).sum() / np.square(delta).sum())


@pytest.mark.parametrize("way", [way for way in WAYS if way != "bitdelta"])
@pytest.mark.parametrize("bits", [0.5, 0.2, 0.05])
def test_no_way_takes_more_than_its_bytes(way, bits):
    delta = delta_of(0.1)
    nbytes = int(bits * delta.size / 8)
    assert arrived(way, delta, LAYOUT, nbytes, 1)[1] <= nbytes


def test_directions_hold_what_is_of_low_rank_and_the_rest_is_left_or_dropped_from():
    delta = delta_of(0.01)
    nbytes = delta.size // 16
    alone = error(arrived("low-rank", delta, LAYOUT, nbytes, 1)[0], delta)
    rested = error(arrived("low-rank+own", delta, LAYOUT, nbytes, 1)[0], delta)
    dropped = error(arrived("own", delta, LAYOUT, nbytes, 1)[0], delta)
    assert alone < 0.03 and rested < 0.5 and dropped > 1


def test_signs_and_scales_are_one_bit_a_parameter():
    delta = delta_of(0.1)
    moved, nbytes = arrived("bitdelta", delta, LAYOUT, 0, 1)
    assert nbytes == delta.size // 8 + 6
    assert np.array_equal(np.sign(moved), np.sign(delta))
    assert error(moved, delta) < 0.6


def test_an_unknown_way_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'low-rank'"):
        arrived("lowrank", delta_of(0.1), LAYOUT, 1000, 1)
