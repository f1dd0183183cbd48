"""What the audits of privacy share: the bound that guesses prove, and the command line.

Each canary takes part with probability 1/2, and an attacker guesses which did. The more guesses are
right, the larger ε must be: the bound holds with 95 % confidence.

Reference: the bound from one run, Steinke, Nasr and Jagielski 2023, arXiv 2305.08846 (theorem 5.2).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.runs.rows import append_row, versions

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Audit:
    """One run's finding: the ε that is promised, what the attacker got right, and what follows."""

    epsilon: float
    guesses: int
    right: int
    bound: float


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


def audit_words(name: str, about: str | None, out: Path) -> argparse.ArgumentParser:
    """The words of every audit's command line."""
    parser = argparse.ArgumentParser(prog=f"python -m simulations.bench.{name}", description=about)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=1.0, help="of Poisson sampling")
    parser.add_argument("--out", type=Path, default=out)
    return parser


def report(
    attack: Callable[..., Audit], options: argparse.Namespace, unit: str, words: Mapping[str, Any]
) -> int:
    """Attack ``runs`` times with noise and as often without; append a row of each, print a line.

    ``words`` go to the attack and into the rows. Returns the exit status: 1 where a bound is on the
    wrong side.
    """
    failed = 0
    for noise in (True, False):
        good, bounds, began = 0, [], time.process_time()
        for seed in range(options.runs):
            found = attack(seed, noise=noise, epsilon=options.epsilon, rate=options.rate, **words)
            # Without noise it has to refute what was asked for, whatever would have been charged.
            good += found.bound <= found.epsilon if noise else found.bound > options.epsilon
            bounds.append(found.bound)
        row = {
            "unit": unit, "noise": noise, "epsilon": options.epsilon, "rate": options.rate,
            **words, "runs": options.runs, "as_promised": good,
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
