"""The accountant against dp-accounting's figures, closed forms and what it must refuse."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.errors import ConfigError
from dare_agg.privacy.accountant import (
    IN_SHARES,
    Spent,
    check_budget,
    concentrated_epsilon,
    default_delta,
    noise_for,
    rho_for,
    spent,
)

# Made by tests/data/privacy/make_vectors.py with dp-accounting 0.6.0.
VECTORS = json.loads(
    (Path(__file__).parents[1] / "data/privacy/dp_accounting.json").read_text(encoding="utf-8")
)


def _named(row):
    return "+".join(f"z{z:g}-q{q:g}-T{t}" for z, q, t in row["parts"]) + f"-d{row['delta']:g}"


@pytest.mark.parametrize("row", VECTORS["pld"], ids=_named)
def test_equals_dp_accounting_to_a_percent_and_is_never_below(row):
    total = Spent()
    for noise, rate, times in row["parts"]:
        total = total.add(noise, rate, times)
    found = total.epsilon(row["delta"])
    assert row["epsilon"] * (1 - 1e-9) <= found <= 1.01 * row["epsilon"]


@pytest.mark.parametrize("row", VECTORS["zcdp"], ids=lambda row: f"{row['rho']}-{row['delta']}")
def test_concentrated_privacy_equals_dp_accounting(row):
    found = concentrated_epsilon(row["rho"], row["delta"])
    assert found == pytest.approx(row["epsilon"], rel=0.01)


def _exact(noise, epsilon):
    """δ(ε) of one Gaussian release, Balle and Wang 2018, arXiv 1805.06530, theorem 5."""

    def cdf(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    mu = 1 / noise
    return cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)


@given(noise=st.floats(0.3, 30), delta=st.sampled_from([1e-3, 1e-5, 1e-7]), times=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_releases_to_all_keep_the_exact_curve(noise, delta, times):
    found = Spent().add(noise, 1.0, times).epsilon(delta)
    joined = noise / math.sqrt(times)
    # Never below: at the found ε, δ holds; a hundredth less would not do.
    assert _exact(joined, found) <= delta * (1 + 1e-6)
    if found > 0.01:
        assert _exact(joined, found * 0.99) > delta


@given(
    noise=st.floats(0.6, 5),
    rate=st.floats(0.01, 0.9),
    times=st.integers(1, 40),
)
@settings(max_examples=15, deadline=None)
def test_more_releases_less_noise_and_more_sampling_never_spend_less(noise, rate, times):
    one = Spent().add(noise, rate, times).epsilon(1e-5)
    slack = 1e-6
    assert Spent().add(noise, rate, times + 1).epsilon(1e-5) >= one - slack
    assert Spent().add(noise * 0.9, rate, times).epsilon(1e-5) >= one - slack
    assert Spent().add(noise, min(1.0, rate * 1.1), times).epsilon(1e-5) >= one - slack
    assert Spent().add(noise, rate, times).epsilon(1e-6) >= one - slack


def test_anchors_of_the_literature():
    assert Spent().add(1, 1, 1).epsilon(1e-5) == pytest.approx(4.38, abs=0.01)
    assert Spent().add(5, 1, 10).epsilon(1e-5) == pytest.approx(2.59, abs=0.01)
    assert Spent().add(1, 0.1, 50).epsilon(1e-5) == pytest.approx(5.15, abs=0.01)


def test_the_order_of_releases_does_not_matter():
    releases = [(1.0, 0.1), (2.0, 1.0), (1.0, 0.1), (3.0, 0.5)]
    assert spent(releases).epsilon(1e-5) == spent(releases[::-1]).epsilon(1e-5)
    assert spent([]).epsilon(1e-5) == 0.0


def test_both_kinds_together_spend_more_than_each():
    both = Spent().add(3.0, 0.2, 10).add_rho(0.05)
    assert both.epsilon(1e-5) > max(
        Spent().add(3.0, 0.2, 10).epsilon(1e-5), concentrated_epsilon(0.05, 1e-5)
    )


@pytest.mark.parametrize(
    ("epsilon", "releases", "rate"), [(8.0, 50, 0.1), (1.0, 100, 1.0), (30.0, 1, 1.0)]
)
def test_calibrated_noise_keeps_the_budget_and_a_hundredth_less_does_not(epsilon, releases, rate):
    noise = noise_for(epsilon, 1e-5, releases, rate)
    assert Spent().add(noise, rate, releases).epsilon(1e-5) <= epsilon
    assert Spent().add(0.99 * noise, rate, releases).epsilon(1e-5) > epsilon


def test_the_rho_of_a_budget_spends_it():
    assert concentrated_epsilon(rho_for(2.0, 1e-5), 1e-5) == pytest.approx(2.0, rel=1e-3)
    assert concentrated_epsilon(rho_for(2.0, 1e-5), 1e-5) <= 2.0


def test_noise_that_hides_nothing_spends_without_end():
    assert Spent().add(0.05, 1.0, 100).epsilon(1e-5) == math.inf


@pytest.mark.parametrize(
    ("epsilon", "delta", "members", "words"),
    [
        (0, 1e-5, 100, "above 0"),
        (-1.0, 1e-5, 100, "above 0"),
        (math.nan, 1e-5, 100, "above 0"),
        (True, 1e-5, 100, "above 0"),
        (50.1, 1e-5, 100, "dp-weak"),
        (math.inf, 1e-5, 100, "dp-weak"),
        (8.0, 0.01, 100, "less than 1/100"),
        (8.0, 0.0, 100, "above 0"),
        (8.0, 1e-12, 100, "at least 1e-09"),
        (8.0, 1e-5, 1, "at least 2"),
    ],
)
def test_nonsense_is_refused(epsilon, delta, members, words):
    with pytest.raises(ConfigError, match=words):
        check_budget(epsilon, delta, members)


def test_a_word_admits_a_weak_promise_and_never_an_infinite_one():
    check_budget(200.0, 1e-5, 100, weak=True)
    with pytest.raises(ConfigError):
        check_budget(math.inf, 1e-5, 100, weak=True)


def test_the_default_delta_is_below_one_over_the_members():
    for members in (2, 10, 1000, 10**8):
        check_budget(1.0, default_delta(members), members)


@pytest.mark.parametrize("noise", [0.0, -1.0, 1e9, math.nan])
def test_a_noise_that_cannot_be_accounted_for_is_refused(noise):
    with pytest.raises(ConfigError):
        Spent().add(noise)


def test_noise_in_shares_is_counted_as_concentrated_and_not_as_a_gaussian():
    found = Spent().add(2.0, IN_SHARES, 3)
    assert found.rho == pytest.approx(3 / 8) and not found.gaussian
    # Its ε is a bound, above that of the Gaussian that it would be at best.
    least = Spent().add(2.0, 1.0, 3).epsilon(1e-5)
    assert least < found.epsilon(1e-5) == pytest.approx(concentrated_epsilon(3 / 8, 1e-5))
    with pytest.raises(ConfigError):
        Spent().add(0.001, IN_SHARES)


@pytest.mark.parametrize("rate", [0.0, -0.5, 1.5, math.nan])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ConfigError):
        Spent().add(1.0, rate)
