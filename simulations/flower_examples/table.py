"""The table of docs/FLOWER_APP.md from the rows of the runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from simulations.flower_examples.apps import APPS


def table(rows: Sequence[dict]) -> str:
    """Mean and spread by example and form, beside what the log warned of, as Markdown."""
    lines = [
        "| example | parameters | clients, rounds | FedAvg | the two lines | warned | with the "
        "line that the warning names |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, app in APPS.items():
        found = {
            form: sorted(
                (row for row in rows if row["example"] == name and row["form"] == form),
                key=lambda row: row["seed"],
            )
            for form in ("fedavg", "dare", "words")
        }
        found = {form: [r for r in of if r["rounds"] == app.rounds] for form, of in found.items()}
        if not found["fedavg"]:
            continue
        parameters = f"{found['fedavg'][0]['parameters']:,}"
        warned = sum(any("noise" in said for said in row["warnings"]) for row in found["dare"])
        words = ", ".join(f"`{line}`" for line in sorted({row["words"] for row in found["words"]}))
        lines.append(
            f"| {name} | {parameters} | {app.clients}, {app.rounds} | "
            f"{_accuracy(found['fedavg'])} | {_accuracy(found['dare'])} | "
            f"{warned} of {len(found['dare'])} | "
            + (f"{words}: {_accuracy(found['words'])} |" if found["words"] else "– |")
        )
    return "\n".join(lines)


def _accuracy(rows: Sequence[dict]) -> str:
    if not rows:
        return "–"
    values = [100 * row["accuracy"] for row in rows]
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
