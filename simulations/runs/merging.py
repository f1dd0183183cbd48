"""Merging models tuned on different tasks: every method with and without DARE.

    python -m simulations.run simulations/scenarios/merging.toml
    python -m simulations.pages.results --only merging

The first makes what is missing of ``simulations/results/merging.jsonl``, the second prints
it as a Markdown table. A seed tunes a model of its own for each task and draws DARE's masks.
The encoders are merged, each task keeps its own head. Fisher and
RegMean get statistics of the very models they merge (of the DARE'd ones where DARE is used,
as in the paper's code), on training rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import Mask, parse_drop_rate
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.methods import find_method
from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.sources import array_source
from simulations.runs.sparsifiers import dare

Statistics = Mapping[str, Mapping[str, Any]]


def run_row(row: Any) -> dict[str, Any]:
    """Merge each set of tasks by each method and measure each task's accuracy."""
    from simulations.runs.tuned_tasks import tuned_tasks

    settings = row.settings
    wanted = {name: {"data": data, **settings["task"]} for name, data in settings["tasks"].items()}
    tuned = tuned_tasks(wanted, row.seed)
    layout, start, whole = tuned.layout, tuned.start, tuned.deltas
    rows = np.arange(settings["test_rows"])

    def score(vector: FloatVector, names: Sequence[str]) -> dict[str, float]:
        return tuned.scores(vector, names, rows)

    points = []
    for rate in settings["drop_rates"]:
        deltas = {name: dropped(delta, rate, row.seed, name) for name, delta in whole.items()}
        kinds = {find_method(spec["method"]).statistics for spec in settings["methods"]} - {None}
        statistics: dict[str, Statistics] = {}  # those of the rate before are gone
        for name, delta in deltas.items():
            body, head = start + delta, tuned.heads[name]
            statistics[name] = collect(tuned.tasks[name], layout, body, head, settings, kinds)
        for subset in settings["sets"]:
            for spec in settings["methods"]:
                if spec["method"] == "slerp" and len(subset) != 2:
                    continue
                vector = start + merged(
                    spec, layout, start, [deltas[n] for n in subset],
                    [statistics[n] for n in subset], row.seed, [whole[n] for n in subset],
                )  # fmt: skip
                scores = score(vector, subset)
                points.append(
                    {
                        "tasks": list(subset),
                        "method": spec["method"],
                        "scaling": spec.get("scaling", 1.0),
                        "options": spec.get("options", {}),
                        "drop_rate": rate,
                        "accuracies": scores,
                        "accuracy": round(mean(scores.values()), 4),
                    }
                )
    bounds = {"single": {}, "base": {}}
    for name, delta in whole.items():
        bounds["single"] |= score(start + delta, (name,))
        bounds["base"] |= score(start, (name,))
    return {
        "accuracy": max(point["accuracy"] for point in points),
        **bounds,
        "points": points,
        "test_rows": settings["test_rows"],
    }


def dropped(delta: FloatVector, rate: str, seed: int, name: str) -> FloatVector:
    """Return a task's delta after DARE with a mask of its own (drop rate 0: as it is)."""
    if rate == "0":
        return delta
    key = derive_key(seed_secret(seed), "mask", name.encode())
    return dare(delta, Mask("stratified", delta.size, parse_drop_rate(rate), key))


def collect(
    task: Any,
    layout: Layout,
    vector: FloatVector,
    head: Mapping[str, Any],
    settings: Any,
    kinds: Collection[str | None],
) -> Statistics:
    """Return what ``kinds`` names of one model's encoder: Fisher values, Gram matrices."""
    from dare_agg.merge.collect import collect_fisher, collect_grams

    if not kinds:
        return {}
    network, read = task.network({**layout.unflatten(vector), **head}, "train")
    count = settings["statistics_examples"]

    def forward(model: Any, batch: Mapping[str, Any]) -> Any:
        return model(**batch)

    def batches(size: int, rows: int) -> Iterator[Mapping[str, Any]]:
        for lo in range(0, rows, size):
            yield read(np.arange(lo, min(rows, lo + size)))

    rows = min(len(task.train_rows), 10 * count)
    found: dict[str, Mapping[str, Any]] = {}
    if "fisher" in kinds:
        found["fisher"] = collect_fisher(network, batches(1, count), forward=forward)
    if "gram" in kinds:
        found["gram"] = collect_grams(network, batches(50, rows), forward=forward)
    return found


def merged(
    spec: Mapping[str, Any],
    layout: Layout,
    start: FloatVector,
    deltas: Sequence[FloatVector],
    statistics: Sequence[Statistics],
    seed: int,
    wholes: Sequence[FloatVector] = (),
) -> FloatVector:
    """Return the merged delta of one method.

    Methods that go by the deltas' own Gram matrices take those of ``wholes``, the deltas before a
    drop, unless ``gram`` is "dropped".
    """
    row = find_method(spec["method"])
    options = dict(spec.get("options", {}))
    grams = row.own_grams and options.get("gram") != "dropped"
    if "seed" in row.options:
        options["seed"] = seed
    result, _ = merge_deltas(
        layout,
        [array_source(delta) for delta in deltas],
        spec["method"],
        scaling=spec.get("scaling", 1.0),
        options=options,
        base=array_source(start),
        statistics=[array_source(whole) for whole in wholes if grams]
        or [s[row.statistics] for s in statistics if row.statistics],
        measure=False,
    )
    return result
