"""Clients that send anything at all: what SECURITY.md promises of runs with a robust rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dare_agg.robust.rule import robust_rule
from dare_agg.rounds.chain import StepContext, chain
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.robust import robust_step
from dare_agg.rounds.server import Accepted, check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model

N, F = 9, 2
BAD = (1, 6)
KEY = bytes(range(32))
RULES = ("norm-bound+nnm+trimmed-mean", "nnm+trimmed-mean", "median", "krum", "geometric-median")


def attack_round(text, attack, weight=10.0):
    """A round with liars; returns how far it went from the honest mean, by what they differ.

    For the delta group (of the survivors) and the dense one.
    """
    rng = np.random.default_rng(5)
    base = {"w": rng.normal(size=(80, 50)).astype(np.float32), "head": np.ones(60, np.float32)}
    model = global_model(base, dense=("head",))
    terms = UpdateTerms(drop_rate="0.8", values="f32", dense=("head",), dense_values="f32")
    settings = FederatedSettings(terms, robust=robust_rule(text, F))
    plans = make_plans(KEY, 1, [None] * N, settings.terms, model.ref, shared_mask=True)
    deltas = [
        {name: rng.normal(0.01, 0.005, a.shape).astype(np.float32) for name, a in base.items()}
        for _ in range(N)
    ]
    honest = [delta for client, delta in enumerate(deltas) if client not in BAD]
    for client in BAD:
        deltas[client] = attack(honest, rng)
    accepted = []
    for client, (plan, delta) in enumerate(zip(plans, deltas, strict=True)):
        tuned = {name: base[name] + delta[name] for name in base}
        update = make_client_update(plan, base, tuned)
        reply = check_reply(plan, update.blob, update.dense_blob, 10.0)
        assert isinstance(reply, Accepted)
        accepted.append(replace(reply, weight=weight) if client in BAD else reply)
    step = chain(robust_step(settings.robust))
    passed = step(accepted, StepContext(model, settings, 1, KEY))
    merged = merge_round(model, passed.accepted, settings)
    at = plans[0].spec().draw_mask().indices(0, merged.delta.size)
    found = []
    for name, result in (("w", merged.delta[at] * np.float32(0.2)), ("head", merged.dense)):
        rows = np.stack([delta[name].ravel() for delta in honest]).astype(np.float64)
        rows = rows[:, at] if name == "w" else rows
        spread = np.linalg.norm(rows - rows.mean(axis=0), axis=1).max()
        found.append(float(np.linalg.norm(result - rows.mean(axis=0)) / spread))
    return found


def far(scale):
    return lambda honest, rng: {k: np.full_like(v, scale) for k, v in honest[0].items()}


def inner_product(scale):
    return lambda honest, rng: {
        k: -np.float32(scale) * np.mean([h[k] for h in honest], axis=0) for k in honest[0]
    }


def a_little(scale):
    return lambda honest, rng: {
        k: np.mean([h[k] for h in honest], axis=0) - np.float32(scale) * np.std(
            [h[k] for h in honest], axis=0
        )
        for k in honest[0]
    }  # fmt: skip


def dense_alone(honest, rng):
    return {"w": honest[0]["w"], "head": np.full_like(honest[0]["head"], 1e5)}


ATTACKS = {
    "far": far(1e6), "far below": far(-1e6), "one step": far(1.0), "nothing": far(0.0),
    "ipm .5": inner_product(0.5), "ipm 3": inner_product(3), "ipm 100": inner_product(100),
    "alie 1": a_little(1), "alie 3": a_little(3), "dense alone": dense_alone,
}  # fmt: skip


@pytest.mark.parametrize("text", RULES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_two_liars_send_the_round_stays_among_the_honest(text, attack):
    delta, dense = attack_round(text, ATTACKS[attack])
    assert delta < 2
    assert dense < 2


@pytest.mark.parametrize("attack", ["far", "far below", "dense alone"])
def test_the_same_attacks_turn_a_mean(attack):
    """What the tests above would see without a rule: `norm-bound` with a limit nobody reaches."""
    delta, dense = attack_round("norm-bound(limit=1e30)", ATTACKS[attack])
    assert max(delta, dense) > 1e3


@pytest.mark.parametrize("text", RULES)
def test_claimed_weights_count_nothing(text):
    assert attack_round(text, ATTACKS["ipm 3"], 1e15) == attack_round(text, ATTACKS["ipm 3"])


def test_liars_may_not_choose_their_mask():
    """All plans name one mask that the server drew: an update of another one is refused."""
    base = {"w": np.zeros((80, 50), np.float32)}
    model, terms = global_model(base), UpdateTerms(drop_rate="0.8", values="f32")
    plans = make_plans(KEY, 1, [None] * N, terms, model.ref, shared_mask=True)
    assert len({(plan.mask_key, plan.rank) for plan in plans}) == 1
    other = replace(plans[0], mask_key=bytes(16))
    update = make_client_update(other, base, {"w": base["w"] + np.float32(1)})
    assert check_reply(plans[0], update.blob, None, 1.0).reason in ("mask", "context")
