"""The noise of keep rates by tensor beside one rate for all, at equal bytes, on real deltas.

    python -m simulations.bench.keep_rates --json

A federated run (MiniLM on Reuters R8, clients by Dirichlet) moves by the exact mean. Beside it
every client's delta of each round from the second on is given keep rates: its own, and those that
the plan tells, from what was merged in the round before of updates that were dropped and coded by
that round's rates. A ratio is that of the second moments Σ δ²/q, in as many bytes as one rate for
all takes, the table of ``own`` included; 1 is as loud as that. Deterministic on one machine.
``--seconds`` gives the CPU seconds of a client's whole update, measuring and coding, over those
with one rate for all: the median of runs in turn, with the kernel of ``--kernel``.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from dare_agg.codec.fitted_rates import levels_of, tensor_squares
from dare_agg.codec.kernels import KERNELS, choose_kernel, kernel_in_use
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import decode_update, encode_update, update_bytes
from dare_agg.merge.engine import merge_deltas
from dare_agg.rounds.client import client_update, settled_spec
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


def seconds(words: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of `client_update` by drop rate and way, relative to one rate for all."""
    choose_kernel(words.kernel)
    model = global_model(build(TASK, words.seed).initial_state(), dense=[HEAD])
    rng, layout = np.random.default_rng(words.seed), model.groups.layout
    tuned = model.delta[:].copy()
    for entry in layout.entries:  # tensors that moved by unlike sizes
        part = tuned[entry.offset : entry.offset + entry.size]
        part += rng.standard_normal(part.size, np.float32) * np.float32(10 ** rng.uniform(-5, -3))
    source, result = array_source(tuned), {}
    for rate in words.drop_rates.split(","):
        plans, took = {}, {keep: [] for keep in KEEP_RATES}
        for keep in KEEP_RATES:
            terms = UpdateTerms(parse_drop_rate(rate), words.values, keep_rates=keep)
            levels = levels_of(layout.sizes, tensor_squares(layout.sizes, tuned - model.delta[:]))
            plans[keep] = make_plans(
                _SECRET, 1, [None], terms, model.ref, layout=layout, levels=levels
            )[0]  # fmt: skip
        for _ in range(words.runs + 1):
            for keep, plan in plans.items():
                start = time.process_time()
                client_update(plan, model, source, model.dense)
                took[keep].append(time.process_time() - start)
        # The first of each warms up.
        once = {keep: median(times[1:]) for keep, times in took.items()}
        result[rate] = {keep: round(once[keep] / once["uniform"], 3) for keep in KEEP_RATES}
    return {"kernel": kernel_in_use(), "parameters": layout.size, "seconds": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drop-rates", default="0.9,0.99,0.999")
    parser.add_argument("--values", default="b1")
    parser.add_argument("--head", action="store_true", help="keep the head in the delta")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", action="store_true", help="CPU seconds in place of noise")
    parser.add_argument("--kernel", choices=KERNELS, default="auto")
    parser.add_argument("--runs", type=int, default=9)
    words = parser.parse_args()
    result = seconds(words) if words.seconds else measure(words)
    print(json.dumps(result) if words.json else json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
