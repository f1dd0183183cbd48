"""A robust rule in a round: one update of all, the same bits in any order of arrival."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from dare_agg.codec.budget import ClientTerms
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ConfigError
from dare_agg.robust.rule import robust_rule
from dare_agg.rounds.chain import StepContext, chain
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.robust import robust_step
from dare_agg.rounds.server import Accepted, check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import StepState, state_from_arrays, state_to_arrays
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model

CLIENTS, F = 9, 2
KEY = bytes(range(32))
DEFAULT = "norm-bound+nnm+trimmed-mean"


def play(text, p="0.9", values="f32", bad=(), own=(), number=1, **words):
    """A round in which the ``bad`` clients send minus thirty times what they learned."""
    rng = np.random.default_rng(0)
    base = {
        "w": rng.normal(size=(60, 50)).astype(np.float32),
        "head": np.ones(9, np.float32),
    }
    terms = UpdateTerms(drop_rate=p, values=values, dense=("head",), dense_values="f32")
    settings = FederatedSettings(terms, robust=robust_rule(text, F), **words)
    model = global_model(base, dense=("head",))
    plans = make_plans(
        KEY, number, list(own) or [None] * CLIENTS, settings.terms, model.ref,
        shared_mask=settings.shared_mask,
    )  # fmt: skip
    accepted = []
    for client, plan in enumerate(plans):
        factor = np.float32(-30 if client in bad else 1)
        tuned = {
            name: array + factor * rng.normal(0.01, 0.003, array.shape).astype(np.float32)
            for name, array in base.items()
        }
        update = make_client_update(plan, base, tuned)
        reply = check_reply(plan, update.blob, update.dense_blob, 10 * (client + 1))
        assert isinstance(reply, Accepted)
        accepted.append(reply)
    names = {plan.client: f"client {plan.client}" for plan in plans}
    return accepted, StepContext(model, settings, number, KEY, names)


def merged(accepted, context):
    step = chain(robust_step(context.settings.robust))
    passed = step(accepted, context)
    return merge_round(context.model, passed.accepted, context.settings), passed


@pytest.mark.parametrize("values", ["f32", "i8", "b1"])
@pytest.mark.parametrize("p", ["0", "0.9"])
@pytest.mark.parametrize("text", [DEFAULT, "krum", "norm-bound", "bucketing+median",
                                  "momentum+nnm+trimmed-mean"])  # fmt: skip
def test_the_order_of_arrival_changes_no_bit(text, p, values):
    accepted, context = play(text, p, values)
    first, _ = merged(accepted, context)
    for order in itertools.islice(itertools.permutations(range(CLIENTS)), 1, 4000, 997):
        again, _ = merged([accepted[i] for i in order], context)
        assert again.delta.tobytes() == first.delta.tobytes()
        assert again.dense.tobytes() == first.dense.tobytes()
        assert again.measurements == first.measurements


@pytest.mark.parametrize("values", ["f32", "b1"])
@pytest.mark.parametrize("p", ["0", "0.9"])
def test_two_loud_clients_turn_the_mean_and_not_the_rule(p, values):
    accepted, context = play(DEFAULT, p, values, bad=(2, 5))
    result, passed = merged(accepted, context)
    plain = merge_round(context.model, accepted, context.settings)
    # What honest clients learned has a mean of 0.01, in both groups.
    assert plain.delta.mean() < 0
    assert plain.dense.mean() < 0
    assert 0.008 < result.delta.mean() < 0.012
    assert 0.008 < result.dense.mean() < 0.012
    told = passed.measurements[0]["robust"]
    assert told["rule"] == DEFAULT
    assert told["shared_mask"]
    heard = dict(zip(told["clients"], told["shares"], strict=True))
    assert max(heard[2], heard[5]) < min(v for k, v in heard.items() if k not in (2, 5)) / 2


def test_a_bound_alone_leaves_clients_their_masks_and_the_method_its_work():
    accepted, context = play("norm-bound", bad=(2, 5), method="ties")
    assert len({reply.plan.rank for reply in accepted}) == CLIENTS
    result, passed = merged(accepted, context)
    assert len(passed.accepted) == CLIENTS
    factors = passed.measurements[0]["robust"]["factors"]
    assert max(factors[2], factors[5]) < 0.1
    assert result.delta.mean() > 0


def test_weights_count_in_a_mean_alone():
    accepted, context = play(DEFAULT)
    first, _ = merged(accepted, context)
    loud = [replace(reply, weight=reply.weight * 1e9) if reply.plan.client == 3 else reply
            for reply in accepted]  # fmt: skip
    again, _ = merged(loud, context)
    assert again.delta.tobytes() == first.delta.tobytes()


def test_clients_of_different_rates_are_refused_and_of_different_formats_are_not():
    rates = [ClientTerms(parse_drop_rate("0.9" if c else "0.8"), "f32") for c in range(CLIENTS)]
    accepted, context = play(DEFAULT, own=rates)
    with pytest.raises(ConfigError, match=r"clients 0 and 1 have drop rates 0.8 and 0.9.*one drop"):
        merged(accepted, context)
    rate = parse_drop_rate("0.9")
    formats = [ClientTerms(rate, ("f32", "i8", "b1")[c % 3]) for c in range(CLIENTS)]
    accepted, context = play(DEFAULT, own=formats, bad=(1, 2))
    assert 0.008 < merged(accepted, context)[0].delta.mean() < 0.012


def test_too_few_updates_are_rejected_not_merged():
    accepted, context = play(DEFAULT)
    passed = chain(robust_step(context.settings.robust))(accepted[:4], context)
    assert not passed.accepted
    assert [r.reason for r in passed.rejections] == ["quorum"] * 4
    assert "bears 2 Byzantine of 5 or more" in passed.rejections[0].detail


@pytest.mark.parametrize("method", ["ties", "fisher", "regmean"])
def test_a_rule_replaces_means_alone(method):
    with pytest.raises(ConfigError, match="set the method to task-arithmetic or average"):
        FederatedSettings(method=method, robust=robust_rule("median", 1))


@pytest.mark.parametrize("rates", ["own", "last"])
def test_keep_rates_by_tensor_are_refused(rates):
    with pytest.raises(ConfigError, match="set keep_rates='uniform'"):
        FederatedSettings(UpdateTerms(keep_rates=rates), robust=robust_rule("median", 1))


def test_a_client_under_anothers_name_cannot_touch_its_momentum():
    accepted, context = play("momentum+median")
    _, passed = merged(accepted, context)
    names = {**context.names, 5: "client 3"}
    again = replace(context, names=names, momenta=passed.momenta)
    _, after = merged(accepted, again)
    assert "client 3" not in after.momenta
    assert after.momenta["client 4"].rounds == 2


def test_momenta_go_through_a_state_file():
    accepted, context = play("momentum+median")
    _, passed = merged(accepted, context)
    state = StepState(3, momenta=passed.momenta)
    again = state_from_arrays(state_to_arrays(state))
    assert again.momenta.keys() == {f"client {client}" for client in range(CLIENTS)}
    for name, one in again.momenta.items():
        assert one.rounds == 1
        assert one.vector.tobytes() == passed.momenta[name].vector.tobytes()
