"""A second set of models for `simulations.runs.gram`: networks of pictures, one a view of them.

    python -m simulations.run simulations/scenarios/gram-pictures.toml

A base of two hidden layers learns Fashion-MNIST as it is. A task is the same pictures seen in
another way (`VIEWS`): its model is tuned from the base, all of it, with a head of its own. Their
bodies are merged as those of ``gram.toml`` are, and scored on every task behind its own head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.merge.engine import merge_deltas
from dare_agg.vectors.layout import FloatVector, layout_of
from dare_agg.vectors.sources import array_source
from simulations.runs.gram import measured
from simulations.runs.small_classifier import Rows, pictures_of, softmax

SIDE, CLASSES = 28, 10
# Rows of the base, of each task, of a batch; the learning rate of SGD.
BASE_ROWS, TASK_ROWS, BATCH, RATE = 10_000, 4_000, 32, 0.1
Pictures = NDArray[np.float32]
Arrays = dict[str, NDArray[np.float32]]
VIEWS: Mapping[str, Callable[[Pictures], Pictures]] = {
    "upside down": lambda x: x[:, ::-1],
    "mirrored": lambda x: x[:, :, ::-1],
    "turned": lambda x: x.transpose(0, 2, 1),
    "negative": lambda x: -x,
}
# Merges of whole deltas, beside which updates stand.
WHOLE = ("average", "ties", "wudi")


def new_network(width: int, seed: int) -> Arrays:
    """Two hidden layers and a head, untrained; matrices lie (out, in)."""
    draw = np.random.default_rng([seed, 11])
    found: Arrays = {}
    inputs = SIDE * SIDE
    for name, outputs in (("first", width), ("second", width), ("head", CLASSES)):
        weight = draw.normal(0, np.sqrt(2 / inputs), (outputs, inputs))
        found |= {f"{name}.weight": weight.astype(np.float32)}
        found |= {f"{name}.bias": np.zeros(outputs, np.float32)}
        inputs = outputs
    return found


def train(arrays: Arrays, rows: Rows, steps: int, seed: object) -> Arrays:
    """The arrays after so many steps of SGD."""
    tuned = {name: array.copy() for name, array in arrays.items()}
    draw = np.random.default_rng(seed)  # type: ignore[arg-type]
    for _ in range(steps):
        places = draw.integers(0, len(rows), BATCH)
        inputs = [rows.inputs[places]]
        for name in ("first", "second"):
            inputs.append(
                np.maximum(inputs[-1] @ tuned[f"{name}.weight"].T + tuned[f"{name}.bias"], 0)
            )
        wrong = softmax(inputs[-1] @ tuned["head.weight"].T + tuned["head.bias"])
        wrong[np.arange(BATCH), rows.labels[places]] -= 1
        wrong *= np.float32(RATE / BATCH)
        for name, fed in (("head", inputs[2]), ("second", inputs[1]), ("first", inputs[0])):
            back = (wrong @ tuned[f"{name}.weight"]) * (fed > 0) if name != "first" else wrong
            tuned[f"{name}.weight"] -= wrong.T @ fed
            tuned[f"{name}.bias"] -= wrong.sum(0)
            wrong = back
    return tuned


def accuracy(arrays: Mapping[str, NDArray[np.float32]], rows: Rows) -> float:
    """Share of the rows whose label is found."""
    fed = rows.inputs
    for name in ("first", "second"):
        fed = np.maximum(fed @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"], 0)
    found = (fed @ arrays["head.weight"].T + arrays["head.bias"]).argmax(1)
    return float(np.mean(found == rows.labels))


def seen(rows: Rows, view: str) -> Rows:
    """Rows as a task sees them."""
    if view not in VIEWS:
        raise ConfigError(f"view {view!r} is unknown{did_you_mean(view, VIEWS)}")
    pictures = rows.inputs.reshape(-1, SIDE, SIDE)
    inputs = np.ascontiguousarray(VIEWS[view](pictures)).reshape(len(rows), -1)
    return Rows(inputs, rows.labels)


def run_row(row: Any) -> dict[str, Any]:
    """Tune a base and a model of each view from it, merge them, score every task."""
    settings = row.settings
    every, test = pictures_of("train"), pictures_of("t10k")
    order = np.random.default_rng([row.seed, 12]).permutation(len(every))
    base = train(
        new_network(settings["width"], row.seed), every.take(order[:BASE_ROWS]),
        2 * settings["steps"], [row.seed, 13],
    )  # fmt: skip
    tests = {v: seen(test.take(np.arange(settings["test_rows"])), v) for v in settings["views"]}
    models = {}
    for number, view in enumerate(settings["views"]):
        first = BASE_ROWS + number * TASK_ROWS
        own = seen(every.take(order[first : first + TASK_ROWS]), view)
        models[view] = train(base, own, settings["steps"], [row.seed, 14, number])
    layout = layout_of({n: a.shape for n, a in base.items() if not n.startswith("head.")})
    start = layout.flatten(base)

    def score(delta: FloatVector) -> dict[str, Any]:
        body = layout.unflatten(start + delta)
        found = {view: round(accuracy({**models[view], **body}, tests[view]), 4) for view in models}
        return {"accuracies": found, "accuracy": round(mean(found.values()), 4)}

    wholes = {view: array_source(layout.flatten(own) - start) for view, own in models.items()}
    scores = {
        "base, own heads": score(np.zeros_like(start))["accuracy"],
        "own models": round(mean(accuracy(models[v], tests[v]) for v in models), 4),
    }
    for method in WHOLE:
        options = {"ridge": settings["ridge"]} if method == "wudi" else {}
        delta, _ = merge_deltas(
            layout, list(wholes.values()), method, options=options, measure=False
        )
        scores[f"{method} of whole deltas"] = score(delta)["accuracy"]
    found = measured(layout, wholes, score, settings, row.seed)
    return {**found, "whole": scores, "test_rows": settings["test_rows"]}
