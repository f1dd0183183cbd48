"""Noise in shares: drawn exactly, and what a sum of it costs."""

import math
from fractions import Fraction

import numpy as np
import pytest

from dare_agg.errors import ConfigError
from dare_agg.privacy.shares import (
    MOST_VARIANCE,
    _exponential,
    _Uniform,
    concentrated,
    discrete_gaussian,
    share_variance,
)

KEY = b"n" * 16


def mass(variance, reach):
    """P(x) for x = −reach … reach."""
    at = np.arange(-reach, reach + 1)
    weights = np.exp(-(at.astype(float) ** 2) / (2 * variance))
    return at, weights / weights.sum()


@pytest.mark.parametrize("variance", [1, 2, 9, 100])
def test_the_draws_have_the_distribution(variance):
    count = 200_000
    drawn = discrete_gaussian(variance, count, KEY)
    at, chance = mass(variance, math.ceil(12 * math.sqrt(variance)))
    seen = np.array([(drawn == x).sum() for x in at])
    assert seen.sum() == count
    often = chance * count > 20
    chi = float(((seen - chance * count)[often] ** 2 / (chance * count)[often]).sum())
    free = often.sum() - 1
    assert chi < free + 5 * math.sqrt(2 * free)


@pytest.mark.parametrize("variance", [5_000, MOST_VARIANCE])
def test_wide_noise_has_its_moments(variance):
    count = 100_000
    drawn = discrete_gaussian(variance, count, KEY).astype(float) / math.sqrt(variance)
    assert abs(drawn.mean()) < 5 / math.sqrt(count)
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((drawn**4).mean() - 3) < 5 * math.sqrt(96 / count)
    assert abs(drawn[1:] @ drawn[:-1]) / count < 5 / math.sqrt(count)


def test_the_draws_are_the_keys_and_no_other_keys():
    one = discrete_gaussian(50, 5000, KEY)
    assert np.array_equal(one, discrete_gaussian(50, 5000, KEY))
    assert abs(np.corrcoef(one, discrete_gaussian(50, 5000, b"m" * 16))[0, 1]) < 0.08


@pytest.mark.parametrize("odds", [Fraction(0), Fraction(1, 7), Fraction(1, 2), Fraction(1)])
def test_a_coin_of_an_exponential_has_its_probability(odds):
    count = 200_000
    top = np.full(count, odds.numerator, np.int64)
    bottom = np.full(count, odds.denominator, np.int64)
    share = _exponential(top, bottom, _Uniform(KEY)).mean()
    wanted = math.exp(-float(odds))
    assert abs(share - wanted) <= 5 * math.sqrt(wanted * (1 - wanted) / count)


def test_uniform_integers_favour_nobody():
    bounds = np.full(60_000, 3 << 61, np.int64)  # a quarter of all words are drawn again
    drawn = _Uniform(KEY).below(bounds)
    share = np.mean(drawn < 1 << 61)
    assert drawn.min() >= 0 and drawn.max() < 3 << 61
    assert abs(share - 1 / 3) < 5 * math.sqrt(2 / 9 / 60_000)


@pytest.mark.parametrize("variance", [0, -1, MOST_VARIANCE + 1, 1.5, True])
def test_noise_that_cannot_be_drawn_exactly_is_refused(variance):
    with pytest.raises(ConfigError, match="variance"):
        discrete_gaussian(variance, 1, KEY)


def test_one_party_costs_what_a_discrete_gaussian_costs():
    assert concentrated(3.0, 18, 1, 100) == pytest.approx(9 / 36)
    # Of many with noise that is wide enough, what their sum's variance costs.
    assert concentrated(10.0, 25, 40, 10_000) == pytest.approx(100 / (2 * 25 * 40), rel=1e-6)


@pytest.mark.parametrize(("variance", "parties"), [(1, 2), (1, 5), (2, 3), (4, 2)])
def test_the_bound_holds_for_sums_worked_out_exactly(variance, parties):
    """Rényi divergences of the true sum and its neighbour are at most α·ρ."""
    _, chance = mass(variance, 14)
    total = np.array([1.0])
    for _ in range(parties):
        total = np.convolve(total, chance)
    for shift in (1, 2):
        rho = concentrated(shift, variance, parties, 1)
        here, there = total[shift:], total[:-shift]
        good = (here > 1e-13) & (there > 1e-13)
        for order in (1.5, 2.0, 3.0, 6.0):
            powers = here[good] ** order * there[good] ** (1 - order)
            divergence = math.log(powers.sum()) / (order - 1)
            assert divergence <= order * rho + 1e-9
        # And is no more than a tenth above what the variance alone would cost, where it is wide.
        if variance >= 4:
            assert rho <= 1.1 * shift**2 / (2 * variance * parties)


@pytest.mark.parametrize(("variance", "parties"), [(1, 2), (1, 5), (1, 20), (2, 3), (3, 8)])
def test_a_sum_is_nowhere_further_from_a_discrete_gaussian_than_counted(variance, parties):
    """What the bound rests on: |ln P/Q| ≤ τ/2 at every sum; its first term pays for τ an element,
    which no divergence of a low order may exceed."""
    _, chance = mass(variance, math.ceil(30 * math.sqrt(variance)))
    total = np.array([1.0])
    for _ in range(parties):
        total = np.convolve(total, chance)
    at, wide = mass(parties * variance, total.size // 2)
    seen = np.abs(at) < 8 * math.sqrt(parties * variance)
    apart = float(np.abs(np.log(total[seen] / wide[seen])).max())
    half = 5 * sum(math.exp(-2 * math.pi**2 * variance * k / (k + 1)) for k in range(1, parties))
    assert apart <= half + 1e-12
    if (variance, parties) == (1, 2):
        assert apart > half / 3  # the count is no wild one
    here, there = total[1:], total[:-1]
    good = (here > 1e-200) & (there > 1e-200)
    for order in (1.001, 1.1, 1.5):
        powers = here[good] ** order * there[good] ** (1 - order)
        divergence = math.log(powers.sum()) / (order - 1)
        assert divergence <= order / (2 * parties * variance) + 2 * half + 1e-9
        assert divergence <= order * concentrated(1.0, variance, parties, 1) + 1e-9


def test_narrow_noise_costs_more_than_its_variance():
    assert concentrated(1.0, 1, 50, 10**6) > 5 * 1 / (2 * 50)


def test_the_least_variance_keeps_the_cost_and_one_less_does_not():
    found = share_variance(0.05, 300.0, 20, 50_000)
    assert concentrated(300.0, found, 20, 50_000) <= 0.05
    assert concentrated(300.0, found - 1, 20, 50_000) > 0.05
    with pytest.raises(ConfigError, match="fewer bits"):
        share_variance(0.05, 1e6, 3, 50_000)


@pytest.mark.parametrize(
    "numbers", [(0.0, 1, 1, 1), (1.0, 0, 1, 1), (1.0, 1, 0, 1), (1.0, 1, 1, 0)]
)
def test_costs_of_nothing_are_refused(numbers):
    with pytest.raises(ConfigError, match="above 0"):
        concentrated(*numbers)
