"""Audit of the privacy of clients: canaries try to be found in the released model.

``python -m simulations.bench.audit`` makes 20 runs with the noise that ε asks for and 20 with the
noise switched off. In each, every canary, a client whose whole update is one random direction,
takes part with probability 1/2. From the final model alone (its product with each direction) an
attacker guesses which did. The bound of `simulations.bench.auditing` has to stay below the ε that
is promised, and to exceed it without noise.

Updates go the whole way: coded, checked, clipped, summed and released by the library. With
``--apart`` clients are not sampled but come so many rounds apart, and rounds share their noise.

``--secure`` audits noise inside a secure sum, as colluders see it: everyone but the canaries takes
its own noise off, and what is left is the noise that is counted. Vectors are clipped, rounded,
noised and summed as words (`simulations.runs.keyless`).

Reference: canaries, Andrew et al. 2023, arXiv 2302.03098.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ConfigError
from dare_agg.privacy import central
from dare_agg.privacy.clients import ClientPrivacy
from dare_agg.privacy.sharing import SharedPrivacy
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.private import private_round
from dare_agg.rounds.server import MergedRound, Rejection, advance, check_reply
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import StepState
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.secure.guard import honest_parties
from dare_agg.secure.result import merged_sum
from dare_agg.secure.settings import SecureSettings
from dare_agg.vectors.model import GlobalModel, global_model
from simulations.bench.auditing import Audit, audit_words, judged, report
from simulations.runs.keyless import keyless_sum, keys_of, noised_terms, roster_of
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
    apart: int = 0,
) -> Audit:
    """Make one run and attack it; without ``noise`` the release is what it would be without."""
    scene = _scene(seed, canaries)
    draw, taking_part = scene.draw, np.flatnonzero(scene.inside)
    terms = UpdateTerms(drop_rate=parse_drop_rate(drop_rate), values="b1", dense=())
    settings = FederatedSettings(terms, weighting="equal", shared_mask=True)
    privacy = ClientPrivacy(CLIENTS + canaries, epsilon, delta=delta, clip=1.0, apart=apart)
    run = privacy.begin(rounds, rate / apart if apart else rate)
    names = [f"client {client}" for client in range(CLIENTS + canaries)]
    model, state = scene.start, StepState()
    for number in range(1, rounds + 1):
        who = [c for c in range(CLIENTS + len(taking_part)) if draw.random() < rate]
        if apart:
            who = [client for client in who if client % apart == number % apart]
        secret = derive_key(seed_secret(seed), "round", number, length=32)
        plans = make_plans(
            secret, number, [None] * max(1, len(who)), terms, model.ref, shared_mask=True
        )
        arrays = model.arrays()
        accepted = []
        for client, plan in zip(who, plans, strict=False):
            if client < CLIENTS:
                change = scene.usual_change()
            else:  # as loud as it likes: what it adds is bounded by the norm alone
                change = 100 * scene.directions[taking_part[client - CLIENTS]]
            tuned = {"weight": np.asarray(arrays["weight"]) + change.reshape(SIDE, SIDE)}
            update = make_client_update(plan, arrays, tuned)
            reply = check_reply(plan, update.blob, update.dense_blob, 1)
            if isinstance(reply, Rejection):
                raise AssertionError(reply.detail)
            accepted.append(reply)
        silent = mock.patch.object(central, "gaussian", lambda key, count: np.zeros(count))
        with nullcontext() if noise else silent:
            merged = private_round(
                model, plans[0], accepted, settings, run, [names[client] for client in who]
            )
        model, state = advance(model, state, merged, settings)
    return judged(scene.scores(model), scene.inside, run.epsilon, delta)


def audit_secure(
    seed: int,
    *,
    noise: bool,
    epsilon: float = 2.0,
    delta: float = 1e-5,
    canaries: int = 160,
    rounds: int = 8,
    rate: float = 1.0,
    drop_rate: str = "0.9",
) -> Audit:
    """As `audit`, where parties add the noise themselves and the others collude.

    A canary that is left out adds its noise alone, as the promise has it. The attacker is the
    server with all other parties, a fifth of the roster: their own noise is no secret to it.
    """
    if rate != 1:
        raise ConfigError(f"rate = {rate}: nobody is sampled in a secure sum")
    scene = _scene(seed, canaries)
    members = CLIENTS + canaries
    roster = roster_of(members)
    privacy = SharedPrivacy(epsilon, delta=delta, clip=1.0)
    run = privacy.begin(rounds, members)
    secure = SecureSettings(
        drop_rate=drop_rate, min_parties=members, threshold=members, privacy=privacy
    )
    update = UpdateTerms(drop_rate=parse_drop_rate(drop_rate), values="f32", dense=())
    settings = FederatedSettings(update, weighting="equal", shared_mask=True)
    colluding = range(1, CLIENTS + 1)
    quiet = colluding if noise else range(1, members + 1)
    model, state = scene.start, StepState()
    for number in range(1, rounds + 1):
        terms = noised_terms(secure, roster, model, number, run.rho)
        if honest_parties(terms.threshold, members, secure.colluding) != canaries:
            raise AssertionError("the noise that is counted is not the canaries'")
        run.charge(number, terms.session)
        mask = terms.mask(derive_key(seed_secret(seed), "round", number, length=32))
        changes = [scene.usual_change() for _ in colluding]
        changes += [
            100 * one * here for one, here in zip(scene.directions, scene.inside, strict=True)
        ]
        vectors = ((party, mask.gather(x)) for party, x in enumerate(changes, 1))
        sums = keyless_sum(terms, mask, vectors, keys_of(seed, number), quiet)
        found = merged_sum(sums, terms, mask)
        merged = MergedRound(found.vector(), None, (), {})
        model, state = advance(model, state, merged, settings)
    return judged(scene.scores(model), scene.inside, run.epsilon, delta)


@dataclass(frozen=True)
class _Scene:
    """A model to begin with, canaries' directions, and which of them are there."""

    draw: np.random.Generator
    directions: NDArray[np.float32]
    inside: NDArray[np.bool_]
    trend: NDArray[np.float32]
    start: GlobalModel

    def usual_change(self) -> NDArray[np.float32]:
        """What a client that is no canary learns."""
        own = self.draw.normal(size=self.trend.size).astype(np.float32)
        return np.float32(5e-4) * (self.trend + own)

    def scores(self, model: GlobalModel) -> NDArray[np.float64]:
        """How far the model has moved along each canary's direction."""
        moved = model.delta[:].astype(np.float64) - self.start.delta[:]
        return np.asarray(self.directions @ moved, np.float64)


def _scene(seed: int, canaries: int) -> _Scene:
    draw = np.random.default_rng([seed, 1])
    directions = draw.normal(size=(canaries, SIDE * SIDE)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    inside = draw.random(canaries) < 0.5
    base = {"weight": draw.normal(size=(SIDE, SIDE)).astype(np.float32)}
    trend = draw.normal(size=SIDE * SIDE).astype(np.float32)
    return _Scene(draw, directions, inside, trend, global_model(base, dense=(), exclude=()))


def main() -> int:
    """Entry point; exit status 1 where a bound is on the wrong side."""
    parser = audit_words("audit", __doc__, OUT)
    parser.add_argument("--drop-rate", default="0.9")
    parser.add_argument("--apart", type=int, default=0, help="rounds between two of a client")
    parser.add_argument("--secure", action="store_true", help="noise of parties in a secure sum")
    options = parser.parse_args()
    words: dict[str, Any] = {"drop_rate": options.drop_rate}
    if options.secure:
        if options.apart or options.rate != 1:
            parser.error("--secure with --apart or --rate: all parties add to every sum")
        return report(audit_secure, options, "client, secure sum", words)
    return report(
        audit, options, "client", words | ({"apart": options.apart} if options.apart else {})
    )


if __name__ == "__main__":
    sys.exit(main())
