"""Rounds of clients with tasks of their own: merges by directions beside task arithmetic and TIES.

    python -m simulations.run simulations/scenarios/gram-rounds.toml
    python -m simulations.pages.results --only gram_rounds

Each client has a task (or a part of one) and a head that stays with it; they share an encoder.
Every round each trains it for some steps and sends its change in few bits, with masks of its own,
and for `wudi` beside them the leading directions of each Linear. All bytes are those of the encoded
bodies. After the last round each client measures the encoder with its own head.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import Update, UpdateSpec, decode_update, encode_update
from dare_agg.merge.directions import directions_of
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.linears import model_linears
from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.sources import array_source


def run_row(row: Any) -> dict[str, Any]:
    """Train and merge over the rounds; accuracy of each client's task at the end."""
    from simulations.runs.federated import build
    from simulations.runs.single import body_layout

    settings = row.settings
    built = {
        data: build({"data": data, **settings["task"]}, row.seed)
        for data in dict.fromkeys(settings["clients"])
    }
    tasks = [built[data] for data in settings["clients"]]
    rows = [_part(tasks, number) for number in range(len(tasks))]
    states = [task.initial_state() for task in tasks]
    layout = body_layout(states[0])
    body = layout.flatten(states[0])
    heads = [{n: a for n, a in state.items() if n not in layout} for state in states]
    test, curve, sent = np.arange(settings["test_rows"]), [], []
    for number in range(1, settings["rounds"] + 1):
        updates, statistics = [], []
        for client, task in enumerate(tasks):
            state = {**layout.unflatten(body), **heads[client]}
            tuned, _, _ = task.train(state, rows[client], seed=(row.seed, number, client))
            heads[client] = {n: a for n, a in tuned.items() if n not in layout}
            delta = layout.flatten(tuned) - body
            update = _update(delta, layout, settings, row.seed, number, client)
            nbytes = update.nbytes
            if settings["directions"]:
                found, more = _directions(delta, layout, settings["directions"], update)
                statistics.append(found)
                nbytes += more
            updates.append(update)
            sent.append(nbytes)
        body = body + _merged(layout, updates, statistics, settings)
        if number in (settings["rounds"] // 2, settings["rounds"]):
            scores = [
                task.evaluate({**layout.unflatten(body), **head}, test)["accuracy"]
                for task, head in zip(tasks, heads, strict=True)
            ]
            curve.append(
                {
                    "round": number,
                    "accuracies": [round(score, 4) for score in scores],
                    "accuracy": round(mean(scores), 4),
                }
            )
    return {
        "accuracy": curve[-1]["accuracy"],
        "curve": curve,
        "parameters": layout.size,
        "bits_per_parameter": round(8 * mean(sent) / layout.size, 4),
    }


def _part(tasks: list[Any], client: int) -> Any:
    """The rows of a client: every so many-th of its task, where several share it."""
    same = [number for number, task in enumerate(tasks) if task is tasks[client]]
    return np.arange(same.index(client), len(tasks[client].train_rows), len(same))


def _update(
    delta: FloatVector, layout: Layout, settings: Any, seed: int, number: int, client: int
) -> Update:
    """A client's change, encoded and decoded; masks are rotated by its rank."""
    secret = seed_secret(seed)
    spec = UpdateSpec(
        size=layout.size,
        drop_rate=parse_drop_rate(settings["drop_rate"]),
        mask="stratified",
        mask_key=derive_key(secret, "mask", number),
        values_key=derive_key(secret, "values", number, client),
        rank=client,
        values=settings["values"],
        base="00" * 32,
        layout=layout.fingerprint,
    )
    return decode_update(encode_update(spec, delta), spec)


def _directions(
    delta: FloatVector, layout: Layout, settings: Any, update: Update
) -> tuple[Mapping[str, FloatVector], int]:
    """The directions of a change after their way, and their bytes."""
    rank, bits = settings
    found = {
        name: (rows, axis)
        for name, rows, axis in directions_of(array_source(delta), model_linears(layout), rank)
    }
    key, context = update.spec.values_key, bytes(32)
    plan = plan_directions(layout, found, gram_values(bits))
    section = encode_directions(layout, plan, found, key, context)
    read = decode_directions(plan, layout, memoryview(section), key, context)
    return read.decoded(), read.nbytes


def _merged(
    layout: Layout, updates: list[Update], statistics: list[Any], settings: Any
) -> FloatVector:
    """As a round of the product merges: masks hold n(1 − p) survivors of an element."""
    options = dict(settings["merge_options"])
    keep = [float(update.spec.drop_rate.keep) for update in updates]
    delta, _ = merge_deltas(
        layout,
        updates,
        settings["merge"],
        scaling=settings["scaling"],
        options=options,
        keep=keep,
        statistics=statistics,
        measure=False,
    )
    return delta
