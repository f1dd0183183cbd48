"""Ways beside the library's own of sending a delta: what they cost, and what they bring."""

import numpy as np
import pytest

from simulations.runs.hard import arrived
from simulations.runs.hard_factors import directions, factors, fitted_scales
from simulations.runs.hard_learning import resent, survivors_of, survivors_spec
from simulations.runs.hard_positions import most_positions
from tests.simulations.test_hard import LAYOUT, delta_of, error


def aligned(moved: np.ndarray, delta: np.ndarray) -> float:
    return float(moved @ delta) ** 2 / float(moved @ moved) / float(delta @ delta)


def test_fewer_bits_a_direction_hold_more_directions():
    delta = np.random.default_rng(1).normal(size=LAYOUT.size).astype(np.float32)
    nbytes = delta.size // 16
    held = [aligned(factors(delta, LAYOUT, nbytes, 1, bits)[0], delta) for bits in (1, 2, 4)]
    assert held[0] > held[2] and held[1] > held[2]


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_all_directions_are_the_matrix(shape):
    matrix = np.random.default_rng(2).normal(size=shape)
    left, held, right = directions(matrix)
    assert np.allclose(left @ right, matrix) and np.all(np.diff(held) <= 0)
    assert np.isclose(held.sum(), np.square(matrix).sum())


def test_scales_are_those_of_least_squares():
    random = np.random.default_rng(3)
    left, right = random.normal(size=(3, 20)), random.normal(size=(3, 30))
    matrix = (left * np.array([[1.0], [-2.0], [0.5]])).T @ right
    assert np.allclose(fitted_scales(matrix, left, right), [1, -2, 0.5], atol=1e-3)


def test_positions_that_fit_take_the_bytes_they_are_given():
    delta = delta_of(0.1)
    for bits in (0.5, 0.1):
        nbytes = int(bits * delta.size / 8)
        for way in ("largest", "ultradelta"):
            assert arrived(way, delta, LAYOUT, nbytes, 1)[1] > 0.75 * nbytes
    assert most_positions(10**6, 10, 16) == 0


def test_the_largest_are_sent_with_their_signs():
    delta = delta_of(0.1)
    moved, _ = arrived("largest", delta, LAYOUT, delta.size // 40, 1)
    kept = moved != 0
    assert 0 < kept.sum() < delta.size / 10
    assert np.abs(delta[kept]).min() >= np.abs(delta[~kept]).max()
    assert np.array_equal(np.sign(moved[kept]), np.sign(delta[kept]))


def test_ultradelta_is_right_in_the_mean():
    delta = delta_of(0.1)
    runs = [arrived("ultradelta", delta, LAYOUT, delta.size // 8, seed)[0] for seed in range(60)]
    one, mean = aligned(runs[0], delta), aligned(np.mean(runs, axis=0, dtype=np.float32), delta)
    assert one < 0.2 < 0.6 < mean


@pytest.mark.parametrize("values", ["b1", "b2", "b4"])
def test_survivors_that_alone_moved_arrive_as_they_are(values):
    delta = delta_of(0.1)
    nbytes = delta.size // 40
    spec = survivors_spec(LAYOUT.size, nbytes, values, 1)
    kept = survivors_of(spec)
    moved, size = resent(spec, delta * kept)
    assert size <= nbytes
    assert np.array_equal(moved, moved * kept)
    assert error(moved, delta * kept) < {"b1": 0.7, "b2": 0.2, "b4": 0.03}[values]
