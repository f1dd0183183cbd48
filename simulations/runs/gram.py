"""Merging tasks from updates that carry directions: accuracy by bytes.

    python -m simulations.run simulations/scenarios/gram.toml
    python -m simulations.pages.results --only gram

A seed tunes a model of its own for each task (those of ``merging.toml``), draws the masks, and
makes updates in a value format at each drop rate. Beside the survivors an update carries the
leading directions of each Linear's whole delta in few bits; `wudi` merges the survivors by them.
All bytes are those of the encoded bodies: survivors, directions, headers, checksums.
Rank 0 is the average of the same updates, rank -1 `wudi` by the survivors alone, and ``whole`` the
whole deltas' Gram matrices, which no update carries. A drop rate may end in `BY_TENSOR`: keep rates
of each tensor's own, in as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.directions import (
    decode_directions,
    encode_directions,
    gram_values,
    plan_directions,
)
from dare_agg.codec.fitted_rates import fitted_rates, levels_of, tensor_squares
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.rates import TensorRates
from dare_agg.codec.update import Update, UpdateSpec, decode_update, encode_update
from dare_agg.merge.directions import directions_of
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.linears import model_linears
from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.sources import ArraySource, array_source

BY_TENSOR = ", rates by tensor"
Directions = Mapping[str, tuple[Any, int]]


def run_row(row: Any) -> dict[str, Any]:
    """Merge all tasks at each drop rate, rank and number of bits; measure each task's accuracy."""
    from simulations.runs.tuned_tasks import tuned_tasks

    settings = row.settings
    names = list(settings["tasks"])
    wanted = {name: {"data": data, **settings["task"]} for name, data in settings["tasks"].items()}
    tuned = tuned_tasks(wanted, row.seed)
    layout, start = tuned.layout, tuned.start
    wholes = [array_source(tuned.deltas[name]) for name in names]
    rows = np.arange(settings["test_rows"])

    def score(delta: FloatVector) -> dict[str, Any]:
        scores = tuned.scores(start + delta, rows=rows)
        return {"accuracies": scores, "accuracy": round(mean(scores.values()), 4)}

    return {
        **measured(layout, dict(zip(names, wholes, strict=True)), score, settings, row.seed),
        "test_rows": settings["test_rows"],
    }


def measured(
    layout: Layout,
    wholes: Mapping[str, ArraySource],
    score: Callable[[FloatVector], dict[str, Any]],
    settings: Any,
    seed: int,
) -> dict[str, Any]:
    """Merge deltas by task at each drop rate, rank and number of bits, and score what comes out."""
    most = max(rank for rank, _ in settings["directions"])
    linears = model_linears(layout)
    found: list[Directions] = [
        {name: (rows, axis) for name, rows, axis in directions_of(whole, linears, most)}
        for whole in wholes.values()
    ]
    points = []
    for rate in settings["drop_rates"]:
        updates = [
            _update(whole, layout, rate, settings["values"], seed, name)
            for name, whole in wholes.items()
        ]
        size = mean(update.nbytes for update in updates)
        ways: list[tuple[int, int]] = [(0, 0), (-1, 0), *map(tuple, settings["directions"])]
        for rank, bits in ways:
            carried = 0.0
            if rank > 0:
                sections = [
                    _carried(one, layout, rank, bits, update)
                    for one, update in zip(found, updates, strict=True)
                ]
                carried = mean(nbytes for _, nbytes in sections)
                delta = _merged(layout, updates, settings, [section for section, _ in sections])
            elif rank == 0:
                delta, _ = merge_deltas(layout, updates, "average", measure=False)
            else:
                delta = _merged(layout, updates, settings, ())
            points.append(
                {
                    "drop_rate": rate,
                    "rank": rank,
                    "bits": bits,
                    "bits_per_parameter": round(8 * (size + carried) / layout.size, 4),
                    **score(delta),
                }
            )
        points.append(
            {
                "drop_rate": rate,
                "rank": "whole",
                "bits": 0,
                "bits_per_parameter": None,
                **score(_merged(layout, updates, settings, list(wholes.values()))),
            }
        )
    return {
        "accuracy": max(point["accuracy"] for point in points),
        "parameters": layout.size,
        "points": points,
    }


def _update(
    whole: ArraySource, layout: Layout, rate: str, values: str, seed: int, name: str
) -> Update:
    """A task's update, encoded and decoded; its masks and signs are drawn from the seed."""
    secret = seed_secret(seed)
    exact = parse_drop_rate(rate.removesuffix(BY_TENSOR))
    spec = UpdateSpec(
        size=layout.size,
        drop_rate=exact,
        mask="stratified",
        mask_key=derive_key(secret, "mask", name.encode()),
        values_key=derive_key(secret, "values", name.encode()),
        rank=0,
        values=values,
        base="00" * 32,
        layout=layout.fingerprint,
    )
    if not rate.endswith(BY_TENSOR):
        return decode_update(encode_update(spec, whole.delta), spec)
    levels = levels_of(layout.sizes, tensor_squares(layout.sizes, whole.delta))
    rates = fitted_rates(layout.sizes, levels, exact, values)
    sent = encode_update(replace(spec, rates=rates), whole.delta)
    return decode_update(sent, replace(spec, rates=TensorRates(layout.sizes)))


def _carried(
    found: Directions, layout: Layout, rank: int, bits: int, update: Update
) -> tuple[Mapping[str, FloatVector], int]:
    """What an update's directions are after their way, and their bytes."""
    kept = {name: (rows[:rank], axis) for name, (rows, axis) in found.items()}
    key, context = update.spec.values_key, bytes(32)
    plan = plan_directions(layout, kept, gram_values(bits))
    section = encode_directions(layout, plan, kept, key, context)
    read = decode_directions(plan, layout, memoryview(section), key, context)
    return read.decoded(), read.nbytes


def _merged(
    layout: Layout, updates: Sequence[Update], settings: Any, statistics: Sequence[Any]
) -> FloatVector:
    options = {"ridge": settings["ridge"]}
    delta, _ = merge_deltas(
        layout, updates, "wudi", options=options, statistics=statistics, measure=False
    )
    return delta
