"""Sums of clipped gradients and their noise: its deviation, its grid, what one row moves."""

import math

import numpy as np
import pytest

from dare_agg.errors import ConfigError
from dare_agg.privacy.central import grid_step
from dare_agg.privacy.gradients import clip_to, drawn_rows, noised

KEY = b"k" * 16


def noise_of(size, deviation, key=KEY, step=0, parts=1):
    sums = [np.zeros(size) for _ in range(parts)]
    return np.concatenate(noised(sums, deviation, key, step))


@pytest.mark.parametrize("deviation", [1e-6, 0.7, 3e4])
def test_noise_has_the_deviation_that_is_charged(deviation):
    noise = noise_of(400_000, deviation) / deviation
    assert abs(noise.mean()) < 5 / math.sqrt(400_000)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / 400_000)
    assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / 400_000)
    assert np.mean(np.abs(noise) > 3) == pytest.approx(0.0027, abs=5 * math.sqrt(0.0027 / 4e5))


def test_all_released_numbers_lie_on_the_grid():
    grid = grid_step(0.7)
    values = [np.random.default_rng(0).standard_normal(70_000)]
    released = noised(values, 0.7, KEY, 3)[0]
    assert np.array_equal(np.rint(released / grid) * grid, released)
    assert 2**28 <= 0.7 / grid <= 2**29


def test_steps_parts_pieces_and_keys_have_noise_of_their_own():
    whole = noise_of(140_000, 1.0, parts=2)
    pieces = [whole[:60_000], whole[70_000:130_000], whole[65_536:125_536]]
    pieces += [noise_of(60_000, 1.0, step=1), noise_of(60_000, 1.0, b"l" * 16)]
    for i, one in enumerate(pieces):
        for other in pieces[:i]:
            assert abs(np.corrcoef(one[:4000], other[:4000])[0, 1]) < 0.08
    assert np.array_equal(whole, noise_of(140_000, 1.0, parts=2))


def test_one_row_moves_a_rounded_sum_by_the_norm_at_most():
    rng = np.random.default_rng(1)
    norm, multiplier, size = 0.5, 2.0, 1000
    grid = grid_step(norm * multiplier)
    clipped = clip_to(norm, multiplier, size)
    assert 0.99 * norm < clipped < norm
    for _ in range(50):
        others = rng.standard_normal(size)
        row = rng.standard_normal(size)
        row *= clipped / np.linalg.norm(row)
        moved = np.rint((others + row) / grid) - np.rint(others / grid)
        exact = sum(int(steps) ** 2 for steps in moved)
        assert exact <= (norm / grid) ** 2


def test_the_same_noise_is_added_to_sums_of_neighbours():
    rng = np.random.default_rng(2)
    one, other = rng.standard_normal(500), rng.standard_normal(500)
    difference = noised([one.copy()], 1.0, KEY, 0)[0] - noised([other.copy()], 1.0, KEY, 0)[0]
    grid = grid_step(1.0)
    assert np.array_equal(difference / grid, np.rint(one / grid) - np.rint(other / grid))


def test_rows_are_drawn_each_by_itself_with_the_rate_that_is_charged():
    counts = np.zeros(2000)
    sizes = []
    for step in range(300):
        drawn = drawn_rows(KEY, step, 2000, 0.05)
        counts[drawn] += 1
        sizes.append(len(drawn))
    expected, deviation = 15.0, math.sqrt(15 * 0.95)
    assert abs(counts.mean() - expected) < 5 * deviation / math.sqrt(2000)
    assert counts.var() == pytest.approx(deviation**2, rel=0.2)
    # Poisson: how many are drawn varies as much as if each decided by itself.
    assert np.var(sizes) == pytest.approx(2000 * 0.05 * 0.95, rel=0.5)


def test_at_rate_one_all_rows_are_drawn_and_at_a_tiny_one_hardly_any():
    assert drawn_rows(KEY, 0, 7, 1.0).tolist() == list(range(7))
    assert len(drawn_rows(KEY, 0, 100, 1e-15)) == 0


def test_noise_that_drowns_everything_is_refused():
    with pytest.raises(ConfigError, match="drowns"):
        clip_to(1.0, 1e4, 10)
