"""Merging models tuned on different tasks: every method with and without DARE.

The encoders are merged, each task keeps its own head. Models come from the same cache as
`simulations.single`; seeds draw the masks.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.derive import derive_key, seed_secret
from dare_agg.layout import FloatVector, Layout
from dare_agg.mask import Mask, parse_drop_rate
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.sources import array_source
from dare_agg.sparsify import dare


def run_row(row: Any) -> dict[str, Any]:
    """Merge every subset of at least two tasks and measure each task's accuracy."""
    from simulations.scenario import read_scenario
    from simulations.single import body_layout, tuned_state

    settings = row.settings
    cells = read_scenario(Path(__file__).parent / "scenarios" / "single.toml").cells
    models = {name: tuned_state(cells[name]["task"]) for name in settings["tasks"]}
    base = next(iter(models.values()))[1]
    layout = body_layout(base)
    start = layout.flatten(base)
    deltas = {name: layout.flatten(tuned) - start for name, (_, _, tuned) in models.items()}

    def score(vector: FloatVector, names: tuple[str, ...]) -> dict[str, float]:
        body = layout.unflatten(vector)
        scores = {}
        for name in names:
            task, _, tuned = models[name]
            heads = {n: a for n, a in tuned.items() if n not in layout}
            scores[name] = round(task.evaluate({**body, **heads})["accuracy"], 4)
        return scores

    names = tuple(settings["tasks"])
    subsets = [s for size in range(2, len(names) + 1) for s in combinations(names, size)]
    points = []
    for subset in subsets:
        if settings["all_only"] and len(subset) < len(names):
            continue
        for spec in settings["methods"]:
            for rate in settings["drop_rates"]:
                if rate == "0" and row.seed:
                    continue  # no randomness in it
                vector = start + merged(spec, layout, [deltas[n] for n in subset], rate, row.seed)
                scores = score(vector, subset)
                points.append(
                    {
                        "tasks": list(subset),
                        "method": spec["method"],
                        "scaling": spec.get("scaling", 1.0),
                        "drop_rate": rate,
                        "accuracies": scores,
                        "accuracy": round(float(np.mean(list(scores.values()))), 4),
                    }
                )
    single = {name: score(start + deltas[name], (name,))[name] for name in names}
    return {
        "accuracy": max(p["accuracy"] for p in points),
        "single": single,
        "points": points,
        "test_rows": [len(models[n][0].test_rows) for n in names],
    }


def merged(
    spec: dict[str, Any], layout: Layout, deltas: list[FloatVector], rate: str, seed: int
) -> FloatVector:
    """Return the merged delta of one method, after DARE where the drop rate is above 0."""
    if rate != "0":
        kept = []
        for index, delta in enumerate(deltas):
            key = derive_key(seed_secret(seed), "mask", index)
            kept.append(dare(delta, Mask("stratified", delta.size, parse_drop_rate(rate), key)))
        deltas = kept
    result, _ = merge_deltas(
        layout,
        [array_source(delta) for delta in deltas],
        spec["method"],
        scaling=spec.get("scaling", 1.0),
        options=spec.get("options", {}),
    )
    return result
