"""How long a run takes over slow links, by the size of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simulations.pages.tables import Rows, by_cell, markdown
from simulations.runs.machines import MESSAGE_BYTES

# Uplinks in kbit/s; the downlink is taken to be as fast.
LINKS = {"NB-IoT": 20, "LTE-M": 300, "rural ADSL": 700, "LTE Cat-1": 2000}
SIZES = {"22.7 M": 22.7e6, "125 M": 125e6, "1 B": 1e9, "7 B": 7e9}


def links_table(rows: Rows, compact: str) -> str:
    """Hours to FedAvg's final accuracy minus one point, by link and model size, mean of the seeds.

    A round lasts as long as one client's transfer and compute, since clients work side by
    side. Transfer follows from the measured bits a parameter; compute is each method's own
    measured CPU time a client and round (training, codec, and its share of merge and test),
    taken to grow with the parameters.
    """
    cells = by_cell(rows)
    lines = []
    for link, kbit in LINKS.items():
        shown_cells = []
        for size in SIZES.values():
            hours = [
                sum(_hours_to(row, dense["accuracy"] - 0.01, size, kbit) for row, dense in pairs)
                / len(pairs)
                for pairs in (
                    [(d, d) for d in cells["FedAvg"]],
                    list(zip(cells[compact], cells["FedAvg"], strict=True)),
                )
            ]
            shown_cells.append(f"{_hours(hours[0])} → {_hours(hours[1])}")
        lines.append((f"{link}, {kbit} kbit/s", *shown_cells))
    return markdown(("Link", *SIZES), lines)


def _hours_to(row: Mapping[str, Any], target: float, size: float, kbit: int) -> float:
    turns = row["rounds"] * row["clients"]
    scale = size / row["parameters"]
    carried = scale * (row["upload_bytes"] + row["download_bytes"]) / turns + MESSAGE_BYTES
    compute = scale * row["cpu_seconds"] / turns
    number = rounds_to(row, target) or row["rounds"]
    return number * (8 * carried / (1000 * kbit) + compute) / 3600


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.0f} d"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.1f} min"


def rounds_to(row: Mapping[str, Any], target: float) -> int | None:
    """First measured round whose accuracy reaches ``target``."""
    return next((p["round"] for p in row["curve"] if p["accuracy"] >= target), None)
