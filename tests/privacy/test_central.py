"""A release: what is clipped, how much noise there is, what it depends on, and the low bits."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.privacy.accountant import Spent
from dare_agg.privacy.central import (
    Clipping,
    Contribution,
    gaussian,
    grid_step,
    on_grid,
    release,
)

SEED = bytes(range(32))


def vectors(count, size, scale=1.0, seed=0):
    draw = np.random.default_rng(seed)
    return [Contribution((scale * draw.normal(size=size)).astype(np.float32)) for _ in range(count)]


@given(
    norm=st.floats(1e-6, 1e6),
    scale=st.floats(1e-8, 1e8),
    noise=st.floats(0.05, 100),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_no_client_moves_the_sum_by_more_than_the_norm(norm, scale, noise, seed):
    (one,) = vectors(1, 257, scale, seed)
    step = grid_step(noise * norm)
    moved = on_grid(one, norm, step)
    # In whole numbers: Python's are exact.
    square = sum(int(value) ** 2 for value in moved)
    assert square <= math.floor((norm / step) ** 2)
    if one.norm > 10 * norm:
        assert math.sqrt(square) * step > 0.99 * norm


def test_short_vectors_are_summed_as_they_are():
    few = vectors(5, 1000, 1e-3)
    made = release(few, 1000, 5.0, Clipping(1.0, 0.05), SEED, 1)
    noise = release([], 1000, 5.0, Clipping(1.0, 0.05), SEED, 1)
    assert made.clipped == 0.0
    assert np.std(made.mean) > 0 and np.std(noise.mean) > 0
    # Noise of deviation .05 over 5 clients; the mean is 20 times smaller.
    assert np.std(made.mean) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_noise_has_the_promised_deviation_and_is_gaussian(quantile):
    size, norm, noise, expected = 200_000, 2.0, 3.0, 40.0
    clipping = Clipping(norm, noise, quantile)
    made = release([], size, expected, clipping, SEED, 7)
    drawn = made.mean.astype(np.float64) * expected
    deviation = clipping.split(expected)[0] * norm
    assert deviation >= noise * norm
    assert made.deviation == deviation
    assert np.std(drawn) == pytest.approx(deviation, rel=0.01)
    assert abs(np.mean(drawn)) < 5 * deviation / math.sqrt(size)
    inside = [np.mean(np.abs(drawn) < k * deviation) for k in (1, 2, 3)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.004)


def test_the_sum_and_the_count_together_are_the_release_that_is_charged():
    clipping = Clipping(1.0, 1.5, 0.5)
    of_sum, counted = clipping.split(30.0)
    both = Spent().add(of_sum).add(2 * counted).epsilon(1e-5)
    assert both == pytest.approx(Spent().add(1.5).epsilon(1e-5), rel=1e-6)


def test_the_norm_follows_the_quantile_of_the_norms():
    rng = np.random.default_rng(3)
    norm = 10.0
    for number in range(1, 60):
        lengths = rng.uniform(0.5, 1.5, 400)
        found = [Contribution(np.array([length, 0], np.float32)) for length in lengths]
        norm = release(found, 2, 400.0, Clipping(norm, 1.0, 0.5), SEED, number).next_norm
    assert norm == pytest.approx(1.0, abs=0.15)


def test_the_same_sum_in_any_order_is_the_same_release_and_another_sum_has_other_noise():
    few = vectors(6, 5000)
    first = release(few, 5000, 6.0, Clipping(1.0, 1.0), SEED, 1)
    again = release(few[::-1], 5000, 6.0, Clipping(1.0, 1.0), SEED, 1)
    assert first.mean.tobytes() == again.mean.tobytes()
    assert first.commitment == again.commitment
    less = release(few[1:], 5000, 6.0, Clipping(1.0, 1.0), SEED, 1)
    assert less.commitment != first.commitment
    # An attacker who sees both, as after a crash, and subtracts: noise of both is left.
    left = (first.mean.astype(np.float64) - less.mean) * 6
    assert np.std(left) == pytest.approx(math.sqrt(2), rel=0.1)


def test_other_seeds_and_rounds_have_other_noise():
    made = [
        release([], 3000, 1.0, Clipping(1.0, 1.0), seed, number).mean
        for seed, number in ((SEED, 1), (SEED, 2), (bytes(32), 1))
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(made[a], made[b])[0, 1]) < 0.1


def test_low_bits_of_a_release_say_nothing_of_the_sum():
    """Mironov 2012: which floating-point numbers can occur must not depend on the data."""
    step = grid_step(1.0)
    for few in ([], vectors(1, 400), vectors(3, 400, 1e-3)):
        found = sum((on_grid(one, 1.0, step) for one in few), np.zeros(400, np.int64))
        noise = np.rint(gaussian(bytes(16), 400) / step)
        total = found + noise
        assert np.array_equal(total, np.floor(total))
        assert np.abs(total).max() < 2**53


def test_halves_of_the_keystream_make_independent_numbers():
    drawn = gaussian(bytes(16), 100_001)
    assert drawn.size == 100_001
    assert abs(np.corrcoef(drawn[:50_000], drawn[50_000:100_000])[0, 1]) < 0.02
    assert np.isfinite(drawn).all()
