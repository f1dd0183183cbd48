"""Terms that the rounds choose: what a run begins with, when they change, and who cannot lie."""

import itertools
import math

import numpy as np
import pytest

from dare_agg.codec.budget import ClientTerms, UploadBudget
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ConfigError, StateError
from dare_agg.rounds.auto import (
    NEAR,
    OF_CHANGE,
    SMALL,
    STAY,
    Judged,
    choices,
    enough,
    heard,
    judge,
    near_median,
    next_terms,
    terms_bytes,
    within,
)
from dare_agg.rounds.auto_state import AutoState
from dare_agg.rounds.noise import LOUD, QUIET, error_of
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import StepState, server_step, state_from_arrays, state_to_arrays
from dare_agg.vectors.layout import layout_of


def terms(rate, values):
    return ClientTerms(parse_drop_rate(rate), values)


def layout(size, name="w"):
    return layout_of({name: (size,)})


def error(chosen):
    return error_of(chosen.drop_rate, chosen.values)


LARGE = choices(layout(SMALL + 1))
LITTLE = choices(layout(1000))


@pytest.mark.parametrize(
    ("size", "name", "words", "first"),
    [
        (1000, "w", {}, terms(0, "b4")),
        (SMALL, "w", {}, terms(0, "b4")),
        (SMALL + 1, "w", {}, terms(0.9, "b1")),
        (SMALL + 1, "w", {"values": "i8"}, terms(0.9, "i8")),
        (1000, "w", {"values": "b1"}, terms(0, "b1")),
        (SMALL + 1, "a.lora_A.weight", {}, terms(0, "b1")),
        (SMALL + 1, "w", {"compared": True}, terms(0, "b4")),
    ],
)
def test_what_a_run_begins_with(size, name, words, first):
    assert choices(layout(size, name), **words).first == first


def test_the_table_goes_from_few_bytes_to_little_noise():
    for found in (LARGE, LITTLE):
        assert found.first in found.every
        sizes = [terms_bytes(one, SMALL) for one in found.every]
        errors = [error(one) for one in found.every]
        assert sizes == sorted(set(sizes))
        assert errors == sorted(set(errors), reverse=True)
        # Neighbours are so far apart that `STAY` keeps them from taking turns.
        assert all(b <= a * STAY**2 for a, b in itertools.pairwise(errors))


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="b3"):
        choices(layout(10), "b3")


def judged(spread=1.0, size=None, change=None, of=14.7):
    return Judged(spread, size, change, of)


def test_noise_above_a_bound_brings_finer_terms_at_once():
    first = LARGE.first
    for size, change in ((math.sqrt(error(first)) / (1.01 * QUIET), None), (None, 1.0 / OF_CHANGE)):
        found = next_terms(LARGE, first, judged(size=size, change=change))
        assert error(found) < error(first)
        assert judged(size=size, change=change).filled(error(found)) <= STAY
    assert next_terms(LARGE, first, judged(size=1e-9)) == LARGE.every[-1]


def test_terms_stay_while_they_keep_the_bounds_and_go_back_with_room():
    whole = terms(0, "b1")
    at = math.sqrt(error(terms(0.5, "b1")))  # noise of the next cheaper ones, at spread 1
    for filled, wanted in ((0.99, whole), (1.01 * STAY, whole), (0.99 * STAY, terms(0.5, "b1"))):
        assert next_terms(LARGE, whole, judged(size=at / (QUIET * filled))) == wanted


def test_no_terms_take_turns_under_steady_noise():
    for scale in np.geomspace(1e-3, 1e3, 200):
        now, seen = LARGE.first, []
        for _ in range(6):
            now = next_terms(LARGE, now, judged(size=scale))
            seen.append(now)
        assert len(set(seen)) == 1


def test_what_is_not_known_changes_nothing():
    assert next_terms(LARGE, LARGE.first, None) == LARGE.first
    assert next_terms(LITTLE, LITTLE.first, judged()) == LITTLE.first


def told(norms, weights=None, errors=None, merged=None, **settings):
    n = len(norms)
    return judge(
        norms,
        weights or [1 / max(n, 1)] * n,
        errors or [14.7] * n,
        FederatedSettings(**settings),
        10.0,
        merged,
    )


def test_the_noise_is_that_of_the_clients():
    found = told([2.0] * 4, scaling=0.5)
    assert found.spread == pytest.approx(0.5 * 2 / math.sqrt(4))
    assert found.of_weights(14.7) == pytest.approx(0.5 * math.sqrt(14.7) / 10)
    assert found.error == pytest.approx(14.7)
    assert found.change is None


def test_what_clients_have_in_common_is_what_the_merge_has_beyond_its_noise():
    n, norm = 16, 3.0
    noise = math.sqrt(14.7) * norm / math.sqrt(n)
    alike = told([norm] * n, merged=math.hypot(norm, noise))
    assert alike.change == pytest.approx(norm)
    assert alike.of_change(14.7) == pytest.approx(math.sqrt(14.7 / n))
    # Nothing in common: the changes still add up as noise does.
    apart = told([norm] * n, merged=noise)
    assert apart.of_change(14.7) == pytest.approx(math.sqrt(14.7))
    assert apart.of_change(error(LARGE.first)) < OF_CHANGE


def test_one_mask_for_all_makes_noise_of_what_clients_have_in_common():
    for n, common in ((4, 1.0), (16, 0.3)):
        merged = common * math.sqrt(1 + 14.7)
        found = told([1.0] * n, merged=merged, method="fisher")
        assert found.spread == pytest.approx(common)
        assert found.of_change(14.7) == pytest.approx(math.sqrt(14.7))
    assert told([1.0] * 4, merged=1e30, method="fisher").spread == pytest.approx(1.0)
    assert told([1.0] * 4, method="fisher").spread == pytest.approx(1.0)


def test_adaptive_steps_are_held_against_the_change_alone():
    found = told([1.0] * 4, merged=5.0, server_step=server_step("adam"))
    assert found.size is None and found.change is not None


LIES = [0.0, 1e-30, 1e30, 1e308, math.inf, -math.inf, math.nan, -1.0]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("n", [3, 10])
def test_one_client_that_lies_moves_the_noise_by_no_more_than_its_bound(lie, n):
    honest = told([1.0] * n)
    found = told([lie] + [1.0] * (n - 1))
    assert found.size == honest.size
    assert found.spread <= honest.spread * math.sqrt((NEAR**2 + n - 1) / n) * (1 + 1e-9)
    assert found.spread >= honest.spread * math.sqrt((NEAR**-2 + n - 1) / n) * (1 - 1e-9)


@pytest.mark.parametrize("lie", LIES)
def test_a_minority_of_liars_leaves_the_median_to_the_others(lie):
    norms = [lie] * 4 + [1.0, 1.1, 0.9, 1.0, 1.05]
    assert all(0.9 / NEAR <= one <= 1.1 * NEAR for one in near_median(norms))


@pytest.mark.parametrize("norms", [[0.0] * 3, [math.nan, math.nan, 1.0], [math.inf] * 4, []])
def test_where_most_tell_nothing_nothing_is_judged(norms):
    assert near_median(norms) is None
    assert told(norms) is None


def test_terms_stay_in_the_table_whatever_is_told():
    for lie in LIES:
        now = LARGE.first
        for _ in range(5):
            now = next_terms(LARGE, now, told([lie, lie, 1.0], merged=1.0))
            assert now in LARGE.every


def test_a_budget_is_an_upper_bound():
    size = 1 << 22
    wanted = terms(0.9, "b1")
    for nbytes in (10_000, 60_000, 100_000, 10_000_000):
        allowed = UploadBudget(nbytes).terms(size, 0, 0.0, mask="stratified")
        found = within(wanted, allowed, size)
        assert terms_bytes(found, size) <= nbytes
        assert (found == wanted) == (terms_bytes(wanted, size) <= nbytes)
    assert within(wanted, None, size) == wanted


def test_the_bytes_that_a_warning_names_are_enough():
    size = SMALL + 1
    for scale in np.geomspace(0.5, 50, 20):
        noise = judged(size=scale)
        needed = enough(LARGE, noise)
        allowed = UploadBudget(terms_bytes(needed, size)).terms(size, 0, 0.0, mask="stratified")
        assert error(within(needed, allowed, size)) <= error(needed)
    assert enough(LARGE, judged(size=1e-9)) == LARGE.every[-1]


def test_two_loud_rounds_are_told_of_once():
    loud, quiet = judged(size=1 / LOUD, of=4.0), judged(size=1 / LOUD, of=1e-4)
    state, said = AutoState(LARGE.first), []
    for one in (loud, quiet, loud, None, loud, loud, loud, loud):
        state, now = heard(state, one)
        said.append(now)
    assert said == [False] * 5 + [True] + [False] * 2


def test_the_state_is_kept_to_the_bit_and_refused_where_it_is_none():
    for state in (AutoState(), AutoState(terms("0.9375", "b2"), 0.1, True)):
        kept = state_to_arrays(StepState(3, auto=state))
        assert state_from_arrays(kept) == StepState(3, auto=state)
    assert "auto.terms" not in state_to_arrays(StepState())
    for name, bad in (
        ("auto.terms", np.array([1, 2, 6, 0])),
        ("auto.terms", np.array([10, 1, 99, 0])),
        ("auto.terms", np.array([10.0, 1, 6, 0])),
        ("auto.loud", np.array([math.nan])),
        ("auto.loud", np.array([1])),
    ):
        with pytest.raises(StateError, match="auto"):
            state_from_arrays({**kept, name: bad})
    with pytest.raises(StateError, match="auto"):
        state_from_arrays({n: a for n, a in kept.items() if n != "auto.loud"})
