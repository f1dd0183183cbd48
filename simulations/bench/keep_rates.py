"""The noise of keep rates by tensor beside one rate for all, at equal bytes, on real deltas.

    python -m simulations.bench.keep_rates --json

A federated run (MiniLM on Reuters R8, clients by Dirichlet) moves by the exact mean. Beside it
every client's delta of each round from the second on is given keep rates: its own, and those that
the plan tells, from what was merged in the round before of updates that were dropped and coded by
that round's rates. A ratio is that of the second moments Σ δ²/q, in as many bytes as one rate for
all takes, the table of ``own`` included; 1 is as loud as that. Deterministic on one machine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import numpy as np

from dare_agg.codec.fitted_rates import tensor_squares
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import decode_update, encode_update, update_bytes
from dare_agg.merge.engine import merge_deltas
from dare_agg.rounds.client import settled_spec
from dare_agg.rounds.levels import levels_told
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.terms import KEEP_RATES, UpdateTerms
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.model import GlobalModel, global_model
from dare_agg.vectors.sources import array_source
from simulations.runs.federated import HEAD, build, divide

TASK = {
    "data": "reuters-r8", "length": 16, "steps": 4, "batch": 8, "learning_rate": 2e-4,
    "test_rows": 100,
}  # fmt: skip
_SECRET = bytes(32)


class Rates:
    """One way of keep rates, round after round, on deltas that it does not change."""

    def __init__(self, keep: str, drop_rate: str, values: str) -> None:
        self.terms = UpdateTerms(parse_drop_rate(drop_rate), values, keep_rates=keep)
        self.levels = b""
        self.nbytes = 0

    def play(self, model: GlobalModel, number: int, deltas: list[FloatVector]) -> list[float]:
        """Σ δ²/q ÷ Σ δ² of each client's update; keeps what the next round is told."""
        layout, moments, updates, drawn = model.groups.layout, [], [], []
        plans = make_plans(
            _SECRET, number, [None] * len(deltas), self.terms, model.ref, layout=layout,
            levels=self.levels,
        )  # fmt: skip
        for plan, delta in zip(plans, deltas, strict=True):
            spec = settled_spec(plan, layout, array_source(delta))
            self.nbytes = max(self.nbytes, update_bytes(spec))
            squares = tensor_squares(layout.sizes, delta)
            strides: Any = 1 / spec.drop_rate.keep
            if spec.rates is not None:
                num, den = spec.rates.known.strides
                strides = num / den
            moments.append(float((squares * strides).sum() / squares.sum()))
            updates.append(decode_update(encode_update(spec, delta), plan.spec(layout)))
            drawn.append(replace(plan, rates=updates[-1].spec.rates))
        if self.terms.keep_rates == "last":
            change, _ = merge_deltas(layout, updates, "task-arithmetic", weights=_equal(deltas))
            self.levels = levels_told(layout.sizes, tensor_squares(layout.sizes, change), drawn)
        return moments


def _equal(deltas: list[FloatVector]) -> list[float]:
    return [1 / len(deltas)] * len(deltas)


def measure(words: argparse.Namespace) -> dict[str, Any]:
    """Train, and compare the ways at each drop rate."""
    settings = {"partition": "dirichlet", "clients": words.clients, "alpha": 0.5}
    task = build(TASK, words.seed)
    parts = divide(task, settings, words.seed)
    model = global_model(task.initial_state(), dense=[] if words.head else [HEAD])
    rates = words.drop_rates.split(",")
    ways = {(rate, keep): Rates(keep, rate, words.values) for rate in rates for keep in KEEP_RATES}
    found: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for number in range(1, words.rounds + 1):
        start, deltas, dense = model.arrays(), [], []
        for client, rows in enumerate(parts):
            tuned, _, _ = task.train(start, rows, seed=(words.seed, number, client))
            groups = model.groups
            deltas.append(groups.layout.flatten(tuned) - model.delta[:])
            if groups.dense_layout.size:
                dense.append(groups.flatten_dense(tuned) - model.dense)
        for way, one in ways.items():
            moments = one.play(model, number, deltas)
            found[way] += moments if number > 1 else []
        mean = np.mean(deltas, axis=0, dtype=np.float32)
        model = model.moved(mean, np.mean(dense, axis=0, dtype=np.float32) if dense else None)
    result: dict[str, Any] = {
        "parameters": model.delta.size, "tensors": len(model.groups.layout.entries),
        "head": "in the delta" if words.head else "apart", "seed": words.seed,
    }  # fmt: skip
    for rate in rates:
        uniform = np.array(found[rate, "uniform"])
        result[rate] = {
            keep: {
                "ratio": round(float(np.mean(np.array(found[rate, keep]) / uniform)), 3),
                "bytes": ways[rate, keep].nbytes,
            }
            for keep in KEEP_RATES
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drop-rates", default="0.9,0.99,0.999")
    parser.add_argument("--values", default="b1")
    parser.add_argument("--head", action="store_true", help="keep the head in the delta")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    words = parser.parse_args()
    result = measure(words)
    print(json.dumps(result) if words.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
