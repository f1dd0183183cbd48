"""Accuracy by bytes moved: until FedAvg's accuracy minus a point, and over a whole run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from dare_agg.runs.words import human_bytes
from simulations.pages.tables import Rows, by_cell, markdown, shown

SETTLED = 3


def settled(row: Mapping[str, Any], number: int | None = None) -> float:
    """Mean accuracy of the last `SETTLED` measured rounds (up to ``number``): one is noisy."""
    curve = row["curve"]
    points = [p for p in curve if number is None or p["round"] <= number][-SETTLED:]
    return math.fsum(p["accuracy"] for p in points) / len(points)


def point_at(row: Mapping[str, Any], target: float) -> Mapping[str, Any] | None:
    """First point of the curve where the mean of the last `SETTLED` points reaches ``target``."""
    curve = row["curve"]
    for end in range(SETTLED, len(curve) + 1):
        if settled({"curve": curve[:end]}) >= target:
            return curve[end - 1]
    return None


def bytes_to(
    rows: Rows, targets: Mapping[int, float], *directions: str
) -> tuple[float, int] | None:
    """Median over the seeds of the bytes until the seed's target, and how many reached it."""
    found = [point_at(row, targets[row["seed"]]) for row in rows]
    reached = [sum(p[d] for d in directions) for p in found if p is not None]
    return (statistics.median(reached), len(reached)) if reached else None


def targets_of(dense: Rows) -> dict[int, float]:
    """For each seed FedAvg's accuracy minus one point."""
    return {row["seed"]: settled(row) - 0.01 for row in dense}


def traffic_table(rows: Rows) -> str:
    """Bytes of a whole run, and of the way to FedAvg minus a point, in both directions."""
    cells = by_cell(rows)
    dense = {r["seed"]: r for r in cells["FedAvg"]}
    targets = targets_of(cells["FedAvg"])
    lines = []
    for cell, own in cells.items():
        total = own[0]["upload_bytes"] + own[0]["download_bytes"]
        gaps = [r["accuracy"] - dense[r["seed"]]["accuracy"] for r in own if r["seed"] in dense]
        first = next(iter(dense.values()), own[0])
        ratio = (first["upload_bytes"] + first["download_bytes"]) / total
        lines.append(
            (
                cell,
                shown([r["accuracy"] for r in own]),
                "–" if cell == "FedAvg" or not gaps else shown(gaps, signed=True),
                human_bytes(own[0]["upload_bytes"]),
                human_bytes(own[0]["download_bytes"]),
                human_bytes(own[0]["head_upload_bytes"] + own[0]["head_download_bytes"]),
                f"{ratio:,.0f}×",
                _reached(own, cells["FedAvg"], targets, "upload_bytes", "download_bytes"),
                str(len(own)),
            )
        )
    columns = (
        "Method",
        "Accuracy, %",
        "minus FedAvg, points",
        "Up, whole run",
        "Down, whole run",
        "of both: head",
        "Smaller by",
        "Both ways to FedAvg − 1 point",
        "Seeds",
    )
    return markdown(columns, lines)


def frontier_table(rows: Rows, baseline: str = "FedAvg") -> str:
    """Accuracy, bytes of the whole run, and bytes until the baseline's accuracy minus a point."""
    cells = by_cell(rows)
    dense = {row["seed"]: row for row in cells[baseline]}
    targets = targets_of(cells[baseline])
    number = cells[baseline][0]["rounds"]
    lines = []
    for cell, own in cells.items():
        own = [row for row in own if row["seed"] in dense]
        if not own:
            continue
        first = own[0]
        ends = next(p for p in first["curve"] if p["round"] == number)
        scores = [settled(row, number) for row in own]
        gaps = [score - settled(dense[row["seed"]]) for score, row in zip(scores, own, strict=True)]
        rivals = [dense[row["seed"]] for row in own]
        upload = first["upload_bytes_per_client_round"]
        lines.append(
            (
                cell,
                shown(scores),
                "–" if cell == baseline else shown(gaps, signed=True),
                f"{8 * upload / first['parameters']:.3g}" if first["parameters"] else "–",
                human_bytes(ends["upload_bytes"]),
                human_bytes(ends["download_bytes"]),
                _rounds(own, targets),
                _reached(own, rivals, targets, "upload_bytes"),
                _reached(own, rivals, targets, "upload_bytes", "download_bytes"),
                str(len(own)),
            )
        )
    columns = (
        "Method",
        "Accuracy, %",
        f"minus {baseline}, points",
        "Bits a parameter, up",
        f"Up, {number} rounds",
        f"Down, {number} rounds",
        f"Rounds to {baseline} − 1 point",
        "Up to it",
        "Both ways to it",
        "Seeds",
    )
    return markdown(columns, lines)


def _rounds(own: Rows, targets: Mapping[int, float]) -> str:
    """Median round in which the target was reached, or how far it was looked for."""
    found = [p["round"] for row in own if (p := point_at(row, targets[row["seed"]])) is not None]
    if not found:
        return f"> {own[0]['rounds']}"
    text = f"{statistics.median(found):g}"
    return text if len(found) == len(own) else f"{text}, {len(found)} of {len(own)}"


def _reached(own: Rows, rivals: Rows, targets: Mapping[int, float], *directions: str) -> str:
    """Bytes to the target and how many times fewer than the baseline's."""
    found, dense = bytes_to(own, targets, *directions), bytes_to(rivals, targets, *directions)
    if found is None or dense is None:
        return "not reached"
    text = f"{human_bytes(round(found[0]))} ({dense[0] / found[0]:,.0f}×)"
    return text if found[1] == len(own) else f"{text}, {found[1]} of {len(own)}"


def mixtures_table(rows: Rows) -> str:
    """Accuracy by method and division of the data, after FedAvg's as differences to it."""

    def cell(method: str, own: Rows, dense: Rows) -> str:
        if method == "FedAvg":
            return shown([settled(row) for row in own])
        by_seed = {row["seed"]: settled(row) for row in dense}
        return shown([settled(row) - by_seed[row["seed"]] for row in own], signed=True)

    return _by_division(rows, cell)


def mixtures_bytes_table(rows: Rows) -> str:
    """Bytes both ways until FedAvg's accuracy minus a point, by method and division."""

    def cell(_: str, own: Rows, dense: Rows) -> str:
        return _reached(own, dense, targets_of(dense), "upload_bytes", "download_bytes")

    return _by_division(rows, cell)


def _by_division(rows: Rows, make: Callable[[str, Rows, Rows], str]) -> str:
    """A table of cells named ``division: method``; ``make`` gets a cell and its FedAvg."""
    cells = by_cell(rows)
    divisions = list(dict.fromkeys(cell.split(": ")[0] for cell in cells))
    methods = list(dict.fromkeys(cell.split(": ")[1] for cell in cells))
    lines = []
    for method in methods:
        line = [method]
        for division in divisions:
            dense = {row["seed"]: row for row in cells.get(f"{division}: FedAvg", [])}
            own = [r for r in cells.get(f"{division}: {method}", []) if r["seed"] in dense]
            line.append(make(method, own, [dense[r["seed"]] for r in own]) if own else "–")
        lines.append(line)
    return markdown(("Method", *divisions), lines)
