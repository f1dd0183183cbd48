"""LoRA clients: sending the two factors of an adapter, or their product.

Each client tunes adapters on its own rows for one round. A server can average the factors,
which is not the average of what they mean (mean(B)·mean(A) is not mean(B·A), FedEx-LoRA, arXiv
2410.09432), or the deltas of the weights, scaling·B·A, which are larger but exact; or, as the run
config's lora-merge = "product" does, take factors and keep the mean of their products at the run's
rank. All go through the product's own round, with and without DARE; NMSE is the squared error of
the merged delta relative to the exact mean of the clients' deltas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.runs.channels import make_channel
from simulations.runs.federated import build, divide
from simulations.runs.scenario import KINDS

State = Mapping[str, NDArray[Any]]
# Factors that travel, and whose products are merged and kept at the common rank.
AT_RANK = "product of factors, at their rank"
# Drop rates that say more than a rate: every value sent, as float32 or in one bit.
FORMS: Mapping[str, Mapping[str, str]] = {
    "0": {"drop_rate": "0", "values": "f32"},
    "0, 1 bit": {"drop_rate": "0"},
}
PREFIX = "base_model.model."
FACTOR_A, FACTOR_B = ".lora_A.default.weight", ".lora_B.default.weight"


def products(state: State, scaling: float) -> dict[str, NDArray[np.float32]]:
    """Return scaling·B·A of every adapted weight, by the weight's name in the plain model."""
    found = {}
    for name, a in state.items():
        if name.endswith(FACTOR_A):
            module = name.removesuffix(FACTOR_A)
            b = state[module + FACTOR_B]
            weight = module.removeprefix(PREFIX) + ".weight"
            found[weight] = (np.float32(scaling) * b @ a).astype(np.float32)
    return found


def own_start(state: State, seed: int, client: int) -> dict[str, NDArray[np.float32]]:
    """Return the state with a client's own random A, as where each starts PEFT by itself."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 50, client]))
    return {
        name: (rng.standard_normal(array.shape) * array.std()).astype(np.float32)
        if name.endswith(FACTOR_A)
        else array.copy()
        for name, array in state.items()
    }


def nmse(found: State, exact: State) -> float:
    """Squared error of a delta relative to the exact one's energy."""
    error = sum(float(np.sum((found[n] - exact[n]) ** 2, dtype=np.float64)) for n in exact)
    return error / sum(float(np.sum(a**2, dtype=np.float64)) for a in exact.values())


def run_row(row: Any) -> dict[str, Any]:
    """Tune every client's adapters once; measure each way of merging them."""
    settings = row.settings
    lora = {**settings["task"], "train": "lora"}
    task = build(lora, row.seed)
    parts = divide(task, settings, row.seed)
    start = task.initial_state()
    scaling = task.config.lora_alpha / task.config.lora_rank
    tuned, weights = [], []
    for client, rows in enumerate(parts):
        first = own_start(start, row.seed, client) if settings["own_start"] else start
        if ranks := settings["ranks"]:
            task.config = replace(task.config, lora_own_rank=ranks[client % len(ranks)])
        state, weight, _ = task.train(first, rows, seed=(row.seed, 1, client))
        tuned.append(state)
        weights.append(float(weight))
    deltas = [products(state, scaling) for state in tuned]
    shares = np.array(weights) / sum(weights)
    exact = {
        name: sum(np.float32(s) * d[name] for s, d in zip(shares, deltas, strict=True))
        for name in deltas[0]
    }
    plain = build({**lora, "train": "full"}, row.seed)
    base = plain.initial

    def score(delta: State) -> dict[str, float]:
        scores = plain.evaluate({**base, **{n: base[n] + d for n, d in delta.items()}})
        return {key: round(scores[key], 4) for key in ("loss", "accuracy")}

    def merged(way: str, rate: str) -> tuple[State, int]:
        """The merged delta, and the bytes of one client's update."""
        zero = {name: np.zeros_like(array) for name, array in exact.items()}
        sent, begun = (deltas, zero) if way == "product" else (tuned, start)
        cell = {**KINDS["federated"][1], "method": "dare", **FORMS.get(rate, {"drop_rate": rate})}
        if way == AT_RANK:
            cell["lora_merge"] = "product"
        channel = make_channel(cell, begun, row.seed, len(sent))
        channel.begin(1, range(len(sent)))
        nbytes = [
            channel.send(client, state, weights[client]).delta for client, state in enumerate(sent)
        ]
        channel.finish()
        state = channel.state()
        return (state if way == "product" else products(state, scaling)), max(nbytes)

    points: list[dict[str, Any]] = [
        {"way": "untouched base", "drop_rate": "1", "bytes": 0, "nmse": 1.0, **score({})}
    ]
    for way, rates in settings["ways"].items():
        for rate in rates:
            delta, nbytes = merged(way, rate)
            points.append(
                {
                    "way": way,
                    "drop_rate": rate,
                    "bytes": nbytes,
                    "nmse": float(f"{nmse(delta, exact):.4g}"),
                    **score(delta),
                }
            )
    return {
        "accuracy": points[1]["accuracy"],
        "loss": points[1]["loss"],
        "test_rows": len(task.test_rows),
        "clients": len(parts),
        "factor_parameters": sum(array.size for array in start.values()),
        "product_parameters": sum(array.size for array in exact.values()),
        "own_start": settings["own_start"],
        "ranks": settings["ranks"],
        "points": points,
    }
