"""Clients who come some rounds apart: the shared noise, what a client moves, choice and budget.

Noise and sensitivity are worked out again here with plain matrices, element by element.
"""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from dare_agg.codec.mask import Mask, parse_drop_rate
from dare_agg.errors import ConfigError, PrivacyError
from dare_agg.privacy.banded import Added, Places, coefficients, length, shared
from dare_agg.privacy.central import Contribution, fresh_noise
from dare_agg.privacy.clients import ClientPrivacy
from dare_agg.privacy.ledger import open_budget
from dare_agg.privacy.spaced import SpacedRun
from dare_agg.privacy.steps import mark


def places_of(number, size=60, dense=3, drop="0.5", kind="bernoulli"):
    return Places(Mask(kind, size, parse_drop_rate(drop), bytes([number]) * 16), dense)


def matrix(rounds, apart):
    """C, from the square root of the matrix of prefix sums by the recurrence of its entries."""
    square = np.zeros((rounds, rounds))
    for t in range(rounds):
        entry = 1.0
        for s in range(t, -1, -1):
            square[t, s] = entry
            entry *= (2 * (t - s) + 1) / (2 * (t - s) + 2)
    assert np.allclose(square @ square, np.tril(np.ones((rounds, rounds))))
    return np.where(np.subtract.outer(range(rounds), range(rounds)) < apart, square, 0.0)


def rounds_of(places, element):
    """The rounds that keep an element."""
    return [t for t, one in enumerate(places) if element in set(one.positions().tolist())]


def added_by(fresh, places, apart):
    before: list[Added] = []
    for values, one in zip(fresh, places, strict=True):
        before.append(shared(values, one, before[max(0, len(before) - apart + 1) :]))
    return before


@pytest.mark.parametrize("apart", [1, 2, 4, 20])
def test_the_noise_is_that_of_the_matrix_for_every_element(apart):
    rng = np.random.default_rng(4)
    places = [places_of(number) for number in range(1, 10)]
    fresh = [rng.standard_normal(one.count) for one in places]
    found = added_by(fresh, places, apart)
    whole = matrix(len(places), apart)
    for element in range(63):
        kept = rounds_of(places, element)
        at = [int(np.flatnonzero(places[t].positions() == element)[0]) for t in kept]
        own = np.array([fresh[t][i] for t, i in zip(kept, at, strict=True)])
        expected = np.linalg.solve(whole[np.ix_(kept, kept)], own) if kept else own
        seen = [found[t].values[i] for t, i in zip(kept, at, strict=True)]
        np.testing.assert_allclose(seen, expected, atol=1e-12)
    assert [one.positions.tolist() for one in found] == [p.positions().tolist() for p in places]


def test_the_coefficients_are_the_square_roots_and_the_length_is_theirs():
    assert coefficients(4) == [1.0, 0.5, 0.375, 0.3125]
    assert length(1) == 1.0
    assert length(4) == pytest.approx(np.linalg.norm(matrix(9, 4)[:, 0]))


def moved_by(vectors, places, apart):
    """‖C·x‖ over all elements of a client's vectors, by round."""
    whole = matrix(len(places), apart)
    square = 0.0
    for element in range(places[0].room):
        kept = rounds_of(places, element)
        own = np.zeros(len(kept))
        for place, t in enumerate(kept):
            if t in vectors:
                at = int(np.flatnonzero(places[t].positions() == element)[0])
                own[place] = vectors[t][at]
        square += float(np.sum((whole[np.ix_(kept, kept)] @ own) ** 2))
    return math.sqrt(square)


@pytest.mark.parametrize("drop", ["0", "0.5", "0.9"])
@pytest.mark.parametrize("came", [(0,), (0, 4), (1, 5, 11), (3, 8)])
def test_a_client_moves_what_is_noised_by_no_more_than_is_charged(drop, came):
    rng = np.random.default_rng(6)
    apart = 4
    places = [places_of(number, drop=drop) for number in range(1, 13)]
    bound = length(apart) * math.sqrt(len(came))
    for _ in range(3):
        vectors = {}
        for t in came:
            draw = rng.standard_normal(places[t].count)
            vectors[t] = draw / np.linalg.norm(draw)
        assert moved_by(vectors, places, apart) <= bound * (1 + 1e-12)
    if drop == "0" and came == (0, 4):  # the bound is reached
        assert moved_by(vectors, places, apart) == pytest.approx(bound)


def test_a_client_that_came_sooner_would_move_it_by_more():
    places = [places_of(number, drop="0") for number in range(1, 9)]
    same = np.full(places[0].count, 1 / math.sqrt(places[0].count))
    assert moved_by({0: same, 3: same}, places, 4) > length(4) * math.sqrt(2) * 1.05


def run_of(path=None, rounds=12, members=40, apart=4, rate=0.2, **words):
    return ClientPrivacy(members, apart=apart, ledger=path, **words).begin(rounds, rate)


def vectors(count, places, seed=0):
    rng = np.random.default_rng(seed)
    return [Contribution(rng.normal(size=places.count).astype(np.float32)) for _ in range(count)]


def test_what_is_released_is_the_clipped_mean_and_the_noise_of_the_matrix():
    """Taking the sums off leaves y; C_K·y is fresh noise of the deviation that is charged."""
    run = run_of(rounds=12, clip=0.5)
    assert isinstance(run, SpacedRun) and run.expected == 8
    places = [places_of(n, size=4000, drop="0.5", kind="stratified") for n in range(1, 13)]
    left = []
    for t, one in enumerate(places):
        given = vectors(5, one, t)
        made = run.release(t + 1, given, one, [f"{t} {i}" for i in range(5)])
        total = sum(x.values * min(1.0, 0.5 / np.linalg.norm(x.values)) for x in given)
        left.append(made.mean.astype(np.float64) * 8 - total)
    deviation = run.budget.noise * length(4) * 0.5
    full = np.zeros((12, 4003))
    for t, one in enumerate(places):
        values = left[t].copy()
        for back in range(1, min(4, t + 1)):
            scratch = np.zeros(4003)
            scratch[places[t - back].positions()] = left[t - back]
            values += coefficients(4)[back] * scratch[one.positions()]
        full[t, one.positions()] = values / deviation
        assert np.std(values) == pytest.approx(deviation, rel=0.05)
    kept = full[-1] != 0
    for t in range(11):
        both = kept & (full[t] != 0)
        assert abs(np.corrcoef(full[t][both], full[-1][both])[0, 1]) < 0.12


def test_a_models_noise_is_less_than_that_of_rounds_apart_from_each_other():
    rounds, apart, size = 24, 8, 6000
    places = [places_of(1, size=size, dense=0, drop="0")] * rounds
    rng = np.random.default_rng(9)
    found = added_by([rng.standard_normal(size) for _ in places], places, apart)
    whole = sum(one.values for one in found) * length(apart)
    alone = math.sqrt(rounds)
    exact = np.linalg.norm(np.linalg.inv(matrix(rounds, apart)).sum(0)) * length(apart)
    assert np.std(whole) == pytest.approx(exact, rel=0.05)
    assert exact < 0.6 * alone


@pytest.mark.parametrize(("rounds", "apart"), [(24, 8), (30, 10), (64, 16), (128, 32)])
def test_a_tree_begun_anew_after_as_many_rounds_adds_more_noise(rounds, apart):
    """Kairouz et al.: a client is in ⌊log₂ b⌋ + 1 nodes, and a model has those that make it up."""
    levels = math.floor(math.log2(apart)) + 1
    tree = [
        levels * ((t // apart) * apart.bit_count() + (t % apart).bit_count())
        for t in range(1, rounds + 1)
    ]
    models = np.cumsum(np.linalg.inv(matrix(rounds, apart)), axis=0) * length(apart)
    band = np.sum(models**2, axis=1)
    assert band.mean() < 0.4 * np.mean(tree) and band[-1] < 0.6 * tree[-1]


def test_epsilon_is_that_of_one_gaussian_for_each_time_a_client_can_have_come():
    run = run_of(rounds=12, epsilon=6.0)
    one = places_of(1)
    spent = []
    while run.may_go_on:
        run.release(len(spent) + 1, [], one, [])
        spent.append(run.epsilon)
    assert len(spent) == 12 and spent[-1] <= 6.0 < spent[-1] * 1.01
    assert len(set(spent)) == 3 and spent[0] == spent[3] < spent[4] == spent[7] < spent[8]
    with pytest.raises(PrivacyError, match="more than ε = 6"):
        run.release(13, [], one, [])
    # δ(ε) of N(0, z²) against N(√k, z²), by its closed form.
    mu = math.sqrt(3) / run.budget.noise
    tail = [0.5 * math.erfc(x / math.sqrt(2)) for x in (6 / mu - mu / 2, 6 / mu + mu / 2)]
    assert tail[0] - math.exp(6) * tail[1] <= run.budget.delta
    mu *= 1.01
    tail = [0.5 * math.erfc(x / math.sqrt(2)) for x in (6 / mu - mu / 2, 6 / mu + mu / 2)]
    assert tail[0] - math.exp(6) * tail[1] > run.budget.delta


def test_a_run_that_goes_on_adds_the_very_noise_of_one_that_never_stopped(tmp_path):
    whole = run_of(tmp_path / "a", rounds=9)
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes())
    one = run_of(tmp_path / "b", rounds=9)
    for t in range(9):
        places = places_of(t + 1, drop="0.5", kind=("stratified", "bernoulli")[t % 2])
        names = [f"{t} {i}" for i in range(2)]
        made = [run.release(t + 1, vectors(2, places, t), places, names) for run in (whole, one)]
        assert made[0].mean.tobytes() == made[1].mean.tobytes()
        one = run_of(tmp_path / "b", rounds=9)
    assert one.budget.steps == whole.budget.steps
    assert one.drawn(10, ["8 1", "new", "0 0"]) == [False, True, True]


def test_nobody_comes_twice_within_the_rounds_and_who_waits_longest_comes_first():
    run = run_of(rounds=40, members=41, rate=0.2, noise=30.0)
    names = [f"client {i}" for i in range(41)]
    came: dict[str, list[int]] = {name: [] for name in names}
    one = places_of(1)
    for t in range(40):
        here = names if t % 3 else names[5:]
        drawn = run.drawn(t + 1, [*here, here[-1]])  # one is there twice
        chosen = [n for n, takes in zip([*here, here[-1]], drawn, strict=True) if takes]
        assert len(chosen) == len(set(chosen)) == 8
        since = {name: t - (came[name] or [-9])[-1] for name in here}
        passed_over = [since[name] for name in here if since[name] >= 4 and name not in chosen]
        assert min(since[name] for name in chosen) >= max(passed_over, default=4)
        for name in chosen:
            came[name].append(t)
        run.release(t + 1, vectors(len(chosen), one), one, chosen)
    gaps = [b - a for times in came.values() for a, b in pairwise(times)]
    assert min(gaps) >= 4
    with pytest.raises(PrivacyError, match=rf"{chosen[0]!r} takes part twice within 4"):
        run.release(41, vectors(1, one), one, [chosen[0]])
    with pytest.raises(PrivacyError, match="twice"):
        run.release(41, vectors(2, one), one, ["new", "new"])
    with pytest.raises(PrivacyError, match="who takes part has to be known"):
        run.release(41, vectors(1, one), one, [])
    assert len(run.budget.charges) == 40  # none was charged


def test_a_round_made_again_after_a_crash_is_another_release_with_other_noise():
    """An attack: the same sum released twice, subtracted, must leave noise."""
    run = run_of(rounds=12)
    one = places_of(1, size=4000)
    made = [run.release(1, [], one, []) for _ in range(2)]
    assert not run.made(1) and len(run.budget.charges) == 2
    assert made[0].commitment == made[1].commitment
    first, second = (m.mean.astype(np.float64) for m in made)
    assert np.std(first - second) > 1.3 * np.std(first)
    assert abs(np.corrcoef(first, second + 0.5 * first)[0, 1]) < 0.08


def test_fresh_noise_is_known_to_nobody_without_the_seed_and_never_used_twice():
    drawn = [
        fresh_noise(seed, at, commitment, 50).tobytes()
        for seed in (bytes(32), b"s" * 32) for at in (0, 1) for commitment in (b"a" * 32, b"b" * 32)
    ]  # fmt: skip
    assert len(set(drawn)) == 8
    assert mark("north") != mark("south") and len(mark("north")) == 16


@pytest.mark.parametrize(
    ("words", "rate", "said"),
    [
        ({}, 0.3, r"take at most 0\.25"),
        ({}, 0.01, r"is nobody; take at least 0\.025"),
        ({}, 0.0, "nobody is drawn"),
        ({"quantile": 0.5}, 0.2, "leave quantile out"),
        ({"apart": 1001}, 0.0001, "from 1 to 1000"),
        ({"apart": -3}, 0.1, "from 1 to 1000"),
        ({"apart": 2.5}, 0.1, "a whole number"),
    ],
)
def test_what_cannot_be_kept_apart_is_refused(words, rate, said):
    with pytest.raises(ConfigError, match=said):
        run_of(**{"rate": rate, **words})


def test_a_budget_of_other_rounds_apart_damaged_or_rolled_back_is_refused(tmp_path):
    path = tmp_path / "budget"
    run = run_of(path)
    one = places_of(1)
    run.release(1, vectors(1, one), one, ["a"])
    before = path.read_bytes()
    run.release(2, vectors(1, one), one, ["b"])
    for other in ({"apart": 3}, {"apart": 0}):
        with pytest.raises(PrivacyError, match="begun with a distance of 4"):
            run_of(path, **other)
    budget = open_budget(path, 8.0, run.budget.delta, 40, 4)
    for steps in ((), budget.steps[:1]):
        replace(budget, steps=steps).write()
        with pytest.raises(PrivacyError, match="cannot be read"):
            run_of(path)
    path.write_bytes(before)
    with pytest.raises(PrivacyError, match="rolled back"):
        run_of(path).budget.check_resumed(2)
