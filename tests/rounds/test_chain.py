"""Steps before the merge: a bound, a screen and a pre-aggregate, alone and in a chain."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from dare_agg.codec.derive import derive_key
from dare_agg.errors import ConfigError, MergeError
from dare_agg.rounds.chain import Passed, StepContext, chain, pooled, reject, scaled
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.server import Accepted, Rejection, check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.rounds.weight_bound import bound_step, bounded_weights
from dare_agg.vectors.model import global_model

CLIENTS = 6
KEY = bytes(range(32))


def play(settings: FederatedSettings, loud: int | None = None):
    """A round of six clients; the ``loud`` one sends fifty times the others' delta."""
    rng = np.random.default_rng(0)
    base = {"w": rng.normal(size=(40, 50)).astype(np.float32), "head": np.ones(9, np.float32)}
    model = global_model(base, dense=("head",))
    plans = make_plans(KEY, 3, [None] * CLIENTS, settings.terms, model.ref)
    accepted = []
    for client, plan in enumerate(plans):
        factor = np.float32(50 if client == loud else 1)
        tuned = {
            name: array + factor * rng.normal(0.001, 0.003, array.shape).astype(np.float32)
            for name, array in base.items()
        }
        update = make_client_update(plan, base, tuned)
        reply = check_reply(plan, update.blob, update.dense_blob, 10 * (client + 1))
        assert isinstance(reply, Accepted)
        accepted.append(reply)
    return accepted, StepContext(model, settings, 3, KEY)


def settings_of(p: str = "0.9", method: str = "task-arithmetic", **words) -> FederatedSettings:
    terms = UpdateTerms(drop_rate=p, values="f32", dense=("head",), dense_values="f32")
    return FederatedSettings(terms, method=method, **words)


def dense_of(source) -> np.ndarray:
    whole = np.empty(source.size, np.float32)
    source.read(0, source.size, whole)
    return whole


def norm_of(reply: Accepted) -> float:
    return float(np.linalg.norm(dense_of(reply.update).astype(np.float64)))


# --- three steps ---------------------------------------------------------------------------


def at_most(norm: float):
    def bound(accepted, context):
        factors = [min(1.0, norm / norm_of(reply)) for reply in accepted]
        bounded = tuple(map(scaled, accepted, factors))
        return Passed(bounded, measurements=({"bounded": sum(f < 1 for f in factors)},))

    return bound


def drop_outliers(accepted, context):
    """Leave out whoever's norm is above three times the median."""
    norms = [norm_of(reply) for reply in accepted]
    most = 3 * float(np.median(norms))
    passed, rejections = [], []
    for reply, norm in zip(accepted, norms, strict=True):
        if norm > most:
            rejections += reject(reply, f"norm {norm:.3g}, at most {most:.3g} is usual")
        else:
            passed.append(reply)
    return Passed(tuple(passed), tuple(rejections), ({"most": most},))


def in_buckets(size: int):
    def pool(accepted, context):
        seed = np.frombuffer(derive_key(context.key, "buckets", length=32), np.uint32)
        order = np.random.default_rng(seed).permutation(len(accepted))
        buckets = [
            [accepted[i] for i in sorted(order[lo : lo + size])]
            for lo in range(0, len(order), size)
        ]
        return Passed(tuple(pooled(b, [1 / len(b)] * len(b)) for b in buckets))

    return pool


# --- alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_an_empty_chain_changes_no_bit(method, weighting):
    settings = settings_of(method=method, weighting=weighting)
    accepted, context = play(settings)
    passed = chain()(accepted, context)
    assert passed == Passed(tuple(accepted))
    plain = merge_round(context.model, accepted, settings)
    merged = merge_round(context.model, passed.accepted, settings)
    assert merged.delta.tobytes() == plain.delta.tobytes()
    assert merged.dense.tobytes() == plain.dense.tobytes()
    assert merged.measurements == plain.measurements


@pytest.mark.parametrize("p", ["0.9", "0"])
def test_a_bound_limits_what_one_client_can_do(p):
    settings = settings_of(p)
    accepted, context = play(settings, loud=4)
    norms = [norm_of(reply) for reply in accepted]
    bound = sorted(norms)[-2]
    passed = chain(at_most(bound))(accepted, context)
    assert passed.measurements == ({"bounded": 1},)
    assert passed.accepted[0] is accepted[0]  # a factor of 1 wraps nothing
    wrapped = passed.accepted[4].update
    assert norm_of(passed.accepted[4]) == pytest.approx(bound, rel=1e-6)
    assert wrapped.survivors == accepted[4].update.survivors
    merged = merge_round(context.model, passed.accepted, settings)
    weights = np.arange(1, CLIENTS + 1) / 21
    factors = np.where(np.arange(CLIENTS) == 4, bound / norms[4], 1)
    for group, got in (("update", merged.delta), ("dense", merged.dense)):
        rows = [dense_of(getattr(reply, group)).astype(np.float64) for reply in accepted]
        np.testing.assert_allclose(got, (weights * factors) @ rows, rtol=2e-5, atol=1e-8)


def test_a_wrapped_update_lists_what_it_reads():
    (reply, *_), _ = play(settings_of())
    source = scaled(reply, 0.25).update
    listed = np.zeros(source.size, np.float32)
    for positions, values in source.sparse(0, source.size):
        listed[positions] = values
    assert np.array_equal(listed, dense_of(source)) and np.count_nonzero(listed) == 200


def test_a_screen_rejects_with_a_reason_and_the_rest_is_merged():
    settings = settings_of()
    accepted, context = play(settings, loud=2)
    passed = chain(drop_outliers)(accepted, context)
    (rejection,) = passed.rejections
    assert (rejection.client, rejection.reason) == (2, "outlier") and "usual" in rejection.detail
    merged = merge_round(context.model, passed.accepted, settings)
    rest = merge_round(context.model, accepted[:2] + accepted[3:], settings)
    assert merged.delta.tobytes() == rest.delta.tobytes() and merged.weights == rest.weights


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_buckets_weigh_what_their_clients_weighed(weighting):
    settings = settings_of(weighting=weighting)
    accepted, context = play(settings)
    passed = chain(in_buckets(4))(accepted, context)
    assert [len(reply.plans) for reply in passed.accepted] in ([4, 2], [2, 4])
    assert sorted(plan.client for r in passed.accepted for plan in r.plans) == list(range(CLIENTS))
    merged = merge_round(context.model, passed.accepted, settings)
    numbers = np.arange(1, CLIENTS + 1) if weighting == "examples" else np.ones(CLIENTS)
    expected = 0.0
    for bucket in passed.accepted:
        own = [plan.client for plan in bucket.plans]
        mean = np.mean([dense_of(accepted[i].update).astype(np.float64) for i in own], axis=0)
        expected = expected + numbers[own].sum() / numbers.sum() * mean
    np.testing.assert_allclose(merged.delta, expected, rtol=2e-5, atol=1e-8)
    measured = merged.measurements
    assert measured["accepted"] == CLIENTS and len(measured["weights"]) == 2
    assert measured["survivors_per_element"] == pytest.approx(0.6)


def claiming(settings, *weights):
    """A round whose clients claim these weights."""
    accepted, context = play(settings)
    claims = [replace(reply, weight=w) for reply, w in zip(accepted, weights, strict=True)]
    passed = chain(bound_step)(claims, context)
    merged = merge_round(context.model, passed.accepted, settings)
    return merged, [client for found in passed.measurements for client in found["weights_cut"]]


@pytest.mark.parametrize("liar", [0, 2, 5])
def test_who_claims_too_much_counts_for_a_multiple_of_the_median(liar):
    weights = [20.0, 30.0, 30.0, 30.0, 40.0, 30.0]
    weights[liar] = 1e7
    merged, cut = claiming(settings_of(weight_bound=50), *weights)
    honest, none = claiming(settings_of(), *(1500.0 if w == 1e7 else w for w in weights))
    np.testing.assert_array_equal(merged.delta, honest.delta)
    np.testing.assert_array_equal(merged.dense, honest.dense)
    assert merged.weights == honest.weights and cut == [liar] and not none


@pytest.mark.parametrize("words", [{"weight_bound": 0}, {"weighting": "equal"}, {}])
def test_a_bound_that_does_not_bind_leaves_every_bit(words):
    numbers = (1, 7, 1e6, 7, 7, 7) if words else (1, 7, 700, 7, 7, 7)
    settings = settings_of(**words)
    accepted, context = play(settings)
    claims = [replace(reply, weight=w) for reply, w in zip(accepted, numbers, strict=True)]
    passed = chain(bound_step)(claims, context)
    assert not passed.measurements
    assert all(a is b for a, b in zip(passed.accepted, claims, strict=True))


def test_the_bound_is_of_the_lower_median():
    assert bounded_weights([1.0, 1e7], 100) == [1.0, 100.0]
    assert bounded_weights([1e7], 100) == [1e7]
    assert bounded_weights([1.0, 2.0, 3.0, 1e7], 100) == [1.0, 2.0, 3.0, 200.0]
    assert bounded_weights([], 100) == []


# --- in a chain ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_a_chain_does_not_depend_on_the_order_of_arrival(method):
    settings = settings_of(method=method)
    accepted, context = play(settings, loud=1)
    steps = chain(drop_outliers, at_most(0.1), in_buckets(2))
    first = steps(accepted, context)
    bits = merge_round(context.model, first.accepted, settings).delta.tobytes()
    assert [r.client for r in first.rejections] == [1]
    assert len(first.accepted) == 3 and len(first.measurements) == 2
    for order in itertools.islice(itertools.permutations(range(CLIENTS)), 0, None, 97):
        again = steps([accepted[i] for i in order], context)
        assert again.rejections == first.rejections and again.measurements == first.measurements
        assert merge_round(context.model, again.accepted, settings).delta.tobytes() == bits


def test_each_step_has_a_key_of_its_own_drawn_from_the_rounds():
    keys = []

    def note(accepted, context):
        keys.append(context.key)
        return Passed(tuple(accepted))

    accepted, context = play(settings_of())
    chain(note, note, chain(note))(accepted, context)
    assert len(set(keys)) == 3 and context.key not in keys
    again = list(keys)
    keys.clear()
    chain(note, note, chain(note))(accepted[::-1], context)
    assert keys == again
    keys.clear()
    chain(note)(accepted, replace(context, key=bytes(32)))
    assert keys[0] not in again


def test_rejecting_a_bucket_rejects_its_clients_and_nobody_left_ends_the_chain():
    def nobody(accepted, context):
        return Passed((), tuple(r for reply in accepted for r in reject(reply, "all of them")))

    def never(accepted, context):
        raise AssertionError("a step without updates was called")

    accepted, context = play(settings_of())
    passed = chain(in_buckets(3), nobody, never)(accepted, context)
    assert not passed.accepted
    assert sorted(rejection.client for rejection in passed.rejections) == list(range(CLIENTS))


# --- what a step must not do ---------------------------------------------------------------


def test_a_step_accounts_for_every_client_once():
    accepted, context = play(settings_of())
    wrong = {
        "loses": lambda a, c: Passed(tuple(a[1:])),
        "doubles": lambda a, c: Passed((*a, a[0])),
        "both": lambda a, c: Passed(tuple(a), reject(a[0], "and yet it stays")),
        "makes up": lambda a, c: Passed(tuple(a), (Rejection(99, "outlier", "who?"),)),
    }
    for step in wrong.values():
        with pytest.raises(MergeError, match="pass, pool or reject each of them once"):
            chain(step)(accepted, context)
    with pytest.raises(ConfigError, match="did you mean 'outlier'"):
        chain(lambda a, c: Passed(tuple(a[1:]), reject(a[0], "far", reason="outlyer")))(
            accepted, context
        )


def test_statistics_of_one_client_cannot_be_pooled():
    accepted, _ = play(settings_of())
    with pytest.raises(MergeError, match="cannot be pooled"):
        pooled([], [])
    measured = replace(accepted[0], statistics=accepted[0].update)
    with pytest.raises(MergeError, match="carries statistics"):
        pooled([measured, accepted[1]], [0.5, 0.5])
    with pytest.raises(MergeError, match="a share each"):
        pooled(accepted[:2], [1.0])
    assert not math.isnan(norm_of(pooled(accepted[:2], [0.5, 0.5])))
