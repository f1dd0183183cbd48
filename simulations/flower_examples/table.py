"""The table of docs/FLOWER_APP.md from the rows of the runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from simulations.flower_examples.apps import APPS


def table(rows: Sequence[dict]) -> str:
    """Mean and spread by example and form, beside what the log warned of, as Markdown."""
    lines = [
        "| example | in place of its data and model | run config | rows | clients, rounds, seeds | "
        "parameters | FedAvg | the two lines | drop rate and format in the end | "
        "bytes up, of float32's | warned | with `drop_rate=0.9` |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, app in APPS.items():
        found: dict[str, list[dict]] = {form: [] for form in ("fedavg", "dare", "words", "fixed")}
        for row in sorted(rows, key=lambda row: row["seed"]):
            if row["example"] == name and as_in_the_table(row):
                found[row["form"]].append(row)
        if not found["fedavg"]:
            continue
        warned = {form: sum(map(_is_warned, found[form])) for form in ("dare", "fixed")}
        words = ", ".join(f"`{line}`" for line in sorted({row["words"] for row in found["words"]}))
        cells = (
            name,
            app.instead,
            ", ".join(f"{key} {value}" for key, value in app.config.items() if key not in _MODELS),
            f"{sum(app.rows):,}",
            f"{app.clients}, {app.rounds}, {len(found['fedavg'])}",
            f"{found['fedavg'][0]['parameters']:,}",
            _accuracy(found["fedavg"]),
            _accuracy(found["dare"]),
            ", ".join(sorted({row["sent"][-1] for row in found["dare"]})),
            _share(found["dare"]),
            f"{warned['dare']} of {len(found['dare'])}"
            + (f"; {words}: {_accuracy(found['words'])}" if words else ""),
            _accuracy(found["fixed"])
            + (f", warned {warned['fixed']} of {len(found['fixed'])}" if warned["fixed"] else ""),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_MODELS = ("model-name", "model.name")


def as_in_the_table(row: Mapping[str, Any]) -> bool:
    """Whether a row is of the rounds, clients and data that `APPS` has now."""
    app = APPS[row["example"]]
    now = (app.rounds, app.clients, list(app.rows))
    return (row["rounds"], row["clients"], row["rows"]) == now


def _is_warned(row: dict) -> bool:
    return any("noise" in said for said in row["warnings"])


def _share(rows: Sequence[dict]) -> str:
    """Bytes of the updates of whole runs relative to as many float32 models."""
    sent = sum(sum(row["update_bytes"]) for row in rows)
    dense = sum(4 * row["parameters"] * len(row["update_bytes"]) for row in rows)
    return f"{100 * sent / dense:.3g} %" if dense else "–"


def _accuracy(rows: Sequence[dict]) -> str:
    if not rows:
        return "–"
    values = [100 * row["accuracy"] for row in rows]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
