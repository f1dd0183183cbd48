"""Audit of the privacy of clients: canaries try to be found in the released model.

``python -m simulations.bench.audit`` makes 20 runs with the noise that ε asks for and 20 with the
noise switched off. In each, every canary, a client whose whole update is one random direction,
takes part with probability 1/2. From the final model alone (its product with each direction) an
attacker guesses which did. The more guesses are right, the larger ε must be: the bound holds with
95 % confidence. It has to stay below the ε that is promised, and to exceed it without noise.

Updates go the whole way: coded, checked, clipped, summed and released by the library.

Reference: canaries, Andrew et al. 2023, arXiv 2302.03098; the bound from one run, Steinke, Nasr and
Jagielski 2023, arXiv 2305.08846 (theorem 5.2).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray

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
from simulations.runs.rows import RESULTS, append_row, versions

CONFIDENCE = 0.95
CLIENTS = 40
SIDE = 64
OUT = RESULTS / "audit.jsonl"


@dataclass(frozen=True)
class Audit:
    """One run's finding: the ε that is promised, what the attacker got right, and what follows."""

    epsilon: float
    guesses: int
    right: int
    bound: float


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
        if noise:
            merged = private_round(model, plans[0], accepted, settings, run)
        else:
            silent = mock.patch.object(central, "gaussian", lambda key, count: np.zeros(count))
            with silent:
                merged = private_round(model, plans[0], accepted, settings, run)
        model, state = advance(model, state, merged, settings)
    moved = model.delta[:].astype(np.float64) - start.delta[:]
    scores = directions @ moved
    return judged(scores, inside, run.epsilon, delta)


def judged(
    scores: NDArray[np.float64], inside: NDArray[np.bool_], epsilon: float, delta: float
) -> Audit:
    """Guess the canaries of highest scores in, of lowest out, and bound ε by what is right.

    How many are guessed is fixed beforehand, half of them: choosing by the outcome would not do.
    """
    order = np.argsort(scores)
    each = scores.size // 4
    right = int(inside[order[-each:]].sum() + (~inside[order[:each]]).sum())
    return Audit(epsilon, 2 * each, right, lower_bound(scores.size, 2 * each, right, delta))


def lower_bound(
    canaries: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest ε that so many right guesses refute with this confidence, 0 for none."""
    if p_value(canaries, guesses, right, 0.0, delta) > 1 - confidence:
        return 0.0
    low, high = 0.0, 50.0
    for _ in range(50):
        middle = (low + high) / 2
        refuted = p_value(canaries, guesses, right, middle, delta) <= 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The probability, at most, that (ε, δ) lets an attacker get so many guesses right."""
    each = 1 / (1 + math.exp(-epsilon))
    chances = np.exp([_log_chance(guesses, count, each) for count in range(guesses + 1)])
    at_least = float(chances[right:].sum())
    # Σ over the i outcomes just below, by i: what δ can move above.
    below = np.cumsum(chances[:right][::-1]) / np.arange(1, right + 1)
    return min(1.0, at_least + 2 * canaries * delta * float(below.max(initial=0.0)))


def _log_chance(count: int, hits: int, each: float) -> float:
    """ln P(Binomial(count, each) = hits)."""
    ways = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
    return ways + hits * math.log(each) + (count - hits) * math.log1p(-each)


def main() -> int:
    """Entry point; exit status 1 where a bound is on the wrong side."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.audit", description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--drop-rate", default="0.9")
    parser.add_argument("--rate", type=float, default=1.0, help="of Poisson sampling")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    failed = 0
    for noise in (True, False):
        good, bounds, began = 0, [], time.process_time()
        for seed in range(options.runs):
            found = audit(
                seed, noise=noise, epsilon=options.epsilon, drop_rate=options.drop_rate,
                rate=options.rate,
            )  # fmt: skip
            good += (found.bound <= found.epsilon) == noise
            bounds.append(found.bound)
        row = {
            "noise": noise, "epsilon": options.epsilon, "drop_rate": options.drop_rate,
            "rate": options.rate, "runs": options.runs, "as_promised": good,
            "bounds": [round(bound, 3) for bound in bounds],
            "cpu_seconds": round(time.process_time() - began, 1), "versions": versions(),
        }  # fmt: skip
        append_row(options.out, row)
        failed += options.runs - good
        word = "at most" if noise else "above"
        sys.stdout.write(
            f"noise {'on' if noise else 'off'}: lower bound {word} ε = {options.epsilon:g} in "
            f"{good} of {options.runs} runs (bounds {min(bounds):.2f} to {max(bounds):.2f})\n"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
