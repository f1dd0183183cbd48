"""The audit: its bound is one, and it tells noise from none."""

import math
from functools import partial

import numpy as np
import pytest

from simulations.bench.audit import audit, audit_secure
from simulations.bench.auditing import lower_bound, p_value


def test_all_right_is_the_closed_form():
    for guesses in (10, 80, 300):
        share = 0.05 ** (1 / guesses)
        assert lower_bound(2 * guesses, guesses, guesses, 0.0) == pytest.approx(
            math.log(share / (1 - share)), rel=1e-6
        )


def test_half_right_says_nothing_and_more_right_never_says_less():
    assert lower_bound(160, 80, 40, 1e-5) == 0.0
    bounds = [lower_bound(160, 80, right, 1e-5) for right in range(40, 81)]
    assert bounds == sorted(bounds)
    assert bounds[-1] > 3
    assert lower_bound(160, 80, 80, 1e-3) < bounds[-1]


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomised_response_is_refuted_no_more_often_than_said(epsilon):
    """The mechanism for which the bound is sharp: each guess right with e^ε/(1 + e^ε)."""
    rng = np.random.default_rng(7)
    right = rng.binomial(80, 1 / (1 + math.exp(-epsilon)), 2000)
    refuted = np.mean([p_value(80, 80, int(found), epsilon, 0.0) <= 0.05 for found in right])
    assert 0.005 < refuted <= 0.06


ATTACKS = pytest.mark.parametrize("attack", [audit, partial(audit, apart=4), audit_secure])


@ATTACKS
@pytest.mark.parametrize("seed", [0, 1])
def test_the_attack_stays_below_what_is_promised(seed, attack):
    found = attack(seed, noise=True)
    assert found.epsilon <= 2.0
    assert found.bound <= found.epsilon


@ATTACKS
@pytest.mark.parametrize("seed", [0, 1])
def test_the_attack_exceeds_what_is_promised_where_noise_is_off(seed, attack):
    found = attack(seed, noise=False)
    assert found.bound > 2.0 >= found.epsilon
