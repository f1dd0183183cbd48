"""Tables of `docs/RESULTS.md` about privacy: accuracy by ε, and the audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from simulations.pages import tables

Row = Mapping[str, Any]
# Way, quantile of the norm, and what the table calls it.
_FORMS = (
    ("central", 0.0, "the server"),
    ("central", 0.5, "the server, norm by median"),
    ("secure", 0.0, "the parties, in a secure sum"),
    ("flower", 0.5, "Flower's wrapper"),
)
_EPSILONS = (0.0, 8.0, 4.0, 2.0, 1.0)
_DROPS = ("0", "0.9", "0.99")


def private_table(rows: Sequence[Row]) -> str:
    """Accuracy in percent by number of clients and ε, mean over the seeds that are there.

    How many seeds stands in brackets where there are several.
    """
    lines = []
    for clients in sorted({row["clients"] for row in rows}, reverse=True):
        own = [row for row in rows if row["clients"] == clients]
        base = f"{100 * mean(row['base'] for row in own):.1f}"
        bare = [_cell(_of(own, "none", drop)) for drop in _DROPS]
        lines.append((f"{clients:,}", base, "none", "", *bare))
        for epsilon in sorted({row["epsilon"] for row in own}, reverse=True):
            for way, quantile, title in _FORMS:
                found = [
                    [
                        row
                        for row in _of(own, way, drop)
                        if (row["epsilon"], row["settings"]["quantile"]) == (epsilon, quantile)
                    ]
                    for drop in _DROPS
                ]
                if any(found):
                    cells = map(_cell, found)
                    lines.append((f"{clients:,}", base, f"ε = {epsilon:g}", title, *cells))
    columns = ("Clients", "Base", "Privacy", "Noise of", "dense", "p=.9", "p=.99")
    sizes = (
        f"{title} {', '.join(_size(rows, way, drop) for drop in _DROPS)}"
        for way, title in (("central", "to a server"), ("secure", "inside a secure sum"))
    )
    return tables.markdown(columns, lines) + f"\n\nAn update: {'; '.join(sizes)} bytes."


def apart_table(rows: Sequence[Row], sampled: Sequence[Row]) -> str:
    """Accuracy in percent of clients who come rounds apart, beside as many who are ``sampled``."""
    lines = []
    for clients, epsilon, drop in sorted(
        {(row["clients"], row["epsilon"], row["drop_rate"]) for row in rows},
        key=lambda cell: (-cell[0], -cell[1], cell[2]),
    ):
        own, beside = (
            [
                row
                for row in _of(some, "central", drop)
                if (row["clients"], row["epsilon"], row["settings"]["quantile"])
                == (clients, epsilon, 0.0)
            ]
            for some in (rows, sampled)
        )
        apart = str(own[0]["settings"]["apart"])
        shown = (f"{clients:,}", f"ε = {epsilon:g}", f"p={drop}", apart)
        lines.append((*shown, _cell(own), _cell(beside)))
    columns = ("Clients", "Privacy", "Updates", "Rounds apart", "rounds apart", "sampled")
    return tables.markdown(columns, lines)


def records_table(rows: Sequence[Row]) -> str:
    """Accuracy in percent of parties that keep their rows to themselves, by task and ε."""
    lines = []
    of = [(row["settings"]["data"], row["settings"]["drop_rate"]) for row in rows]
    for title, drop in sorted(set(of)):
        own = [row for row, its in zip(rows, of, strict=True) if its == (title, drop)]
        by_epsilon = [
            _cell([row for row in own if row["epsilon"] == epsilon]) for epsilon in _EPSILONS
        ]
        lines.append((title, f"p={drop}", f"{own[0]['bytes']:,}", *by_epsilon))
    shown = ("none", *(f"ε = {epsilon:g}" for epsilon in _EPSILONS[1:]))
    return tables.markdown(("Task", "Updates", "Bytes", *shown), lines)


def _size(rows: Sequence[Row], way: str, drop: str) -> str:
    """Bytes of an update, of the most clients that are there."""
    found = {row["clients"]: row["bytes"] for row in _of(rows, way, drop)}
    return f"{found[max(found)]:,}" if found else "–"


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
    newest = {
        (row.get("unit", "client"), row["epsilon"], row["drop_rate"], _who(row), row["noise"]): row
        for row in rows
    }
    lines = [
        (
            "parties, in a secure sum" if "secure" in unit else "the server",
            f"{epsilon:g}",
            f"p={drop}",
            who,
            "on" if noise else "off",
            f"{min(row['bounds']):.2f} to {max(row['bounds']):.2f}",
            f"{row['as_promised']} of {row['runs']} {'at most ε' if noise else 'above ε'}",
        )
        for (unit, epsilon, drop, who, noise), row in newest.items()
    ]
    columns = (
        "Noise of",
        "ε promised",
        "Updates",
        "Sampling",
        "Noise",
        "Lower bounds found",
        "Runs",
    )
    return tables.markdown(columns, lines)


def _who(row: Row) -> str:
    """How clients come to take part."""
    if "apart" in row:
        return f"{row['apart']} rounds apart"
    return "all, each round" if row["rate"] == 1 else f"sampled, {row['rate']:g}"
