"""Audit of the privacy of clients: canaries try to be found in the released model.

``python -m simulations.bench.audit`` makes 20 runs with the noise that ε asks for and 20 with the
noise switched off. In each, every canary, a client whose whole update is one random direction,
takes part with probability 1/2. From the final model alone (its product with each direction) an
attacker guesses which did. The bound of `simulations.bench.auditing` has to stay below the ε that
is promised, and to exceed it without noise.

Updates go the whole way: coded, checked, clipped, summed and released by the library.

Reference: canaries, Andrew et al. 2023, arXiv 2302.03098.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from unittest import mock

import numpy as np

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.privacy import central
from dare_agg.privacy.clients import ClientPrivacy
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.private import private_round
from dare_agg.rounds.server import Rejection, advance, check_reply
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import StepState
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model
from simulations.bench.auditing import Audit, audit_words, judged, report
from simulations.runs.rows import RESULTS

CLIENTS = 40
SIDE = 64
OUT = RESULTS / "audit.jsonl"


def audit(
    seed: int,
    *,
    noise: bool,
    epsilon: float = 2.0,
    delta: float = 1e-5,
    canaries: int = 160,
    rounds: int = 8,
    rate: float = 1.0,
    drop_rate: str = "0.9",
    values: str = "b1",
) -> Audit:
    """Make one run and attack it; without ``noise`` the release is what it would be without."""
    draw = np.random.default_rng([seed, 1])
    directions = draw.normal(size=(canaries, SIDE * SIDE)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    inside = draw.random(canaries) < 0.5
    taking_part = np.flatnonzero(inside)
    base = {"weight": draw.normal(size=(SIDE, SIDE)).astype(np.float32)}
    trend = draw.normal(size=SIDE * SIDE).astype(np.float32)
    terms = UpdateTerms(drop_rate=parse_drop_rate(drop_rate), values=values, dense=())
    settings = FederatedSettings(terms, weighting="equal", shared_mask=True)
    privacy = ClientPrivacy(CLIENTS + canaries, epsilon, delta=delta, clip=1.0)
    run = privacy.begin(rounds, rate)
    start = model = global_model(base, dense=(), exclude=())
    state = StepState()
    for number in range(1, rounds + 1):
        who = [c for c in range(CLIENTS + len(taking_part)) if draw.random() < rate]
        secret = derive_key(seed_secret(seed), "round", number, length=32)
        plans = make_plans(
            secret, number, [None] * max(1, len(who)), terms, model.ref, shared_mask=True
        )
        arrays = model.arrays()
        accepted = []
        for client, plan in zip(who, plans, strict=False):
            if client < CLIENTS:
                change = 5e-4 * (trend + draw.normal(size=trend.size).astype(np.float32))
            else:  # as loud as it likes: what it adds is bounded by the norm alone
                change = 100 * directions[taking_part[client - CLIENTS]]
            tuned = {"weight": np.asarray(arrays["weight"]) + change.reshape(SIDE, SIDE)}
            update = make_client_update(plan, arrays, tuned)
            reply = check_reply(plan, update.blob, update.dense_blob, 1)
            if isinstance(reply, Rejection):
                raise AssertionError(reply.detail)
            accepted.append(reply)
        silent = mock.patch.object(central, "gaussian", lambda key, count: np.zeros(count))
        with nullcontext() if noise else silent:
            merged = private_round(model, plans[0], accepted, settings, run)
        model, state = advance(model, state, merged, settings)
    moved = model.delta[:].astype(np.float64) - start.delta[:]
    scores = directions @ moved
    return judged(scores, inside, run.epsilon, delta)


def main() -> int:
    """Entry point; exit status 1 where a bound is on the wrong side."""
    parser = audit_words("audit", __doc__, OUT)
    parser.add_argument("--drop-rate", default="0.9")
    options = parser.parse_args()
    return report(audit, options, "client", {"drop_rate": options.drop_rate})


if __name__ == "__main__":
    sys.exit(main())
