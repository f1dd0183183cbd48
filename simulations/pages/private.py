"""Tables of `docs/RESULTS.md` about privacy: accuracy by ε, and the audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from simulations.pages import tables

Row = Mapping[str, Any]
_WAYS = (("central", "0"), ("central", "0.9"), ("central", "0.99"), ("flower", "0"))


def private_table(rows: Sequence[Row]) -> str:
    """Accuracy in percent by number of clients and ε, mean over the seeds that are there.

    How many seeds stands in brackets where there are several.
    """
    lines = []
    for clients in sorted({row["clients"] for row in rows}, reverse=True):
        own = [row for row in rows if row["clients"] == clients]
        base = f"{100 * mean(row['base'] for row in own):.1f}"
        bare = [_of(own, "none", drop) for _, drop in _WAYS[:3]]
        lines.append((f"{clients:,}", base, "none", "–", *map(_cell, bare), "–"))
        for epsilon in sorted({row["epsilon"] for row in own}, reverse=True):
            for quantile, norm in ((0.5, "median"), (0.0, "fixed")):
                found = [
                    [
                        row
                        for row in _of(own, way, drop)
                        if row["epsilon"] == epsilon and row["settings"]["quantile"] == quantile
                    ]
                    for way, drop in _WAYS[:3]
                ]
                if not any(found):
                    continue
                flower = [row for row in _of(own, "flower", "0") if row["epsilon"] == epsilon]
                cells = (*map(_cell, found), _cell(flower))
                lines.append((f"{clients:,}", base, f"ε = {epsilon:g}", norm, *cells))
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
        "Clients", "Base", "Privacy", "Norm", "central, dense", "central, p=.9", "central, p=.99",
        "Flower's wrapper, dense",
    )  # fmt: skip
    return tables.markdown(columns, lines) + f"\n\nAn update: {sizes}."


def _of(rows: Sequence[Row], way: str, drop: str) -> list[Row]:
    return [row for row in rows if (row["way"], row["drop_rate"]) == (way, drop)]


def _cell(rows: Sequence[Row]) -> str:
    """The mean, and of how many seeds where it is of several."""
    if not rows:
        return "–"
    shown = f"{100 * mean(row['accuracy'] for row in rows):.1f}"
    return f"{shown} ({len(rows)})" if len(rows) > 1 else shown


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
