"""Tables of `docs/RESULTS.md` about privacy: accuracy by ε, and the audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from simulations.pages import tables

Row = Mapping[str, Any]
_WAYS = (("central", "0"), ("central", "0.9"), ("central", "0.99"), ("flower", "0"))


def private_table(rows: Sequence[Row]) -> str:
    """Accuracy in percent by number of clients and ε, mean over the seeds that are there."""
    lines = []
    for clients in sorted({row["clients"] for row in rows}, reverse=True):
        own = [row for row in rows if row["clients"] == clients]
        bases = mean(row["base"] for row in own)
        for epsilon in [None, *sorted({row["epsilon"] for row in own}, reverse=True)]:
            cells = [
                [
                    row
                    for row in own
                    if row["drop_rate"] == drop
                    and row["way"] == ("none" if epsilon is None else way)
                    and (epsilon is None or row["epsilon"] == epsilon)
                    and not (epsilon is None and way == "flower")
                ]
                for way, drop in _WAYS
            ]
            if not any(cells):
                continue
            seeds = {len({row["seed"] for row in cell}) for cell in cells if cell}
            lines.append(
                (
                    f"{clients:,}",
                    f"{100 * bases:.1f}",
                    "none" if epsilon is None else f"ε = {epsilon:g}",
                    *(_percent(cell) for cell in cells),
                    "–".join(map(str, sorted(seeds))),
                )
            )
    sizes = ", ".join(
        f"{label} {mean(found):,.0f} B"
        for label, way, drop in (
            ("dense", "central", "0"),
            ("p=.9", "central", "0.9"),
            ("p=.99", "central", "0.99"),
        )
        if (found := [r["bytes"] for r in rows if (r["way"], r["drop_rate"]) == (way, drop)])
    )
    columns = (
        "Clients", "Base", "Privacy", "central, dense", "central, p=.9", "central, p=.99",
        "Flower's wrapper, dense", "Seeds",
    )  # fmt: skip
    return tables.markdown(columns, lines) + f"\n\nAn update: {sizes}."


def _percent(cell: Sequence[Row]) -> str:
    return f"{100 * mean(row['accuracy'] for row in cell):.1f}" if cell else "–"


def audit_table(rows: Sequence[Row]) -> str:
    """Bounds on ε by the attack, with and without noise: the newest row of each setting."""
    newest = {(row["epsilon"], row["drop_rate"], row["rate"], row["noise"]): row for row in rows}
    lines = [
        (
            f"{epsilon:g}",
            f"p={drop}",
            f"{rate:g}",
            "on" if noise else "off",
            f"{min(row['bounds']):.2f} to {max(row['bounds']):.2f}",
            f"{row['as_promised']} of {row['runs']} {'at most ε' if noise else 'above ε'}",
        )
        for (epsilon, drop, rate, noise), row in newest.items()
    ]
    columns = ("ε promised", "Updates", "Sampling", "Noise", "Lower bounds found", "Runs")
    return tables.markdown(columns, lines)
