"""Tables and the picture of buffers beside rounds: time, bytes, and a day of many clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.runs.words import human_bytes
from simulations.pages.plots import COLOURS, make_axes, save
from simulations.pages.tables import Rows, by_cell, markdown, shown

FEDAVG, ROUNDS = "FedAvg, rounds", "DARE, rounds"
# Accuracies are means of so many measurements.
_MEAN_OF = 3


def final(row: Mapping[str, Any]) -> float:
    """The accuracy a run ends with: the mean of its last measurements."""
    return math.fsum(point["accuracy"] for point in row["curve"][-_MEAN_OF:]) / _MEAN_OF


def seconds_to(curve: Sequence[Mapping[str, Any]], target: float) -> float | None:
    """When the mean of the last three measurements first reached ``target``; None for never."""
    for end in range(_MEAN_OF, len(curve) + 1):
        last = curve[end - _MEAN_OF : end]
        if math.fsum(point["accuracy"] for point in last) / _MEAN_OF >= target:
            return float(last[-1]["seconds"])
    return None


def clock_table(rows: Rows, fedavg: str = FEDAVG, rounds: str = ROUNDS) -> str:
    """Virtual hours to FedAvg's accuracy minus a point, by cell, beside both kinds of rounds.

    A cell is compared with the rounds of its own seeds and of the division of the data that its
    name ends with, behind a semicolon.
    """
    cells = by_cell(rows)

    def division(cell: str) -> str:
        return cell.partition(";")[1] + cell.partition(";")[2]

    def times_of(cell: str) -> dict[int, float | None]:
        targets = {row["seed"]: final(row) - 0.01 for row in cells[fedavg + division(cell)]}
        return {row["seed"]: seconds_to(row["curve"], targets[row["seed"]]) for row in cells[cell]}

    lines = [
        (
            cell,
            shown([final(row) for row in own]),
            f"{own[0]['curve'][-1]['seconds'] / 3600:.1f}",
            _hours(list(times_of(cell).values())),
            _times(times_of(fedavg + division(cell)), times_of(cell)),
            _times(times_of(rounds + division(cell)), times_of(cell)),
            human_bytes(round(np.mean([row["bytes_an_update"] for row in own]))),
            str(len(own)),
        )
        for cell, own in cells.items()
    ]
    columns = (
        "Way", "Accuracy at the end, %", "after hours", "Hours to FedAvg − 1 point",
        "shorter than FedAvg's rounds", "shorter than DARE's rounds", "Bytes an update", "Seeds",
    )  # fmt: skip
    return markdown(columns, lines)


def _hours(times: Sequence[float | None]) -> str:
    met = [seconds / 3600 for seconds in times if seconds is not None]
    if not met:
        return "not reached"
    few = f", {len(met)} of {len(times)}" if len(met) < len(times) else ""
    return f"{np.mean(met):.2f}{few}"


def _times(slow: Mapping[int, float | None], quick: Mapping[int, float | None]) -> str:
    """How many times shorter, the smallest and the largest of the seeds."""
    found = []
    for seed, seconds in quick.items():
        before = slow.get(seed)
        if seconds is not None and before is not None:
            found.append(before / seconds)
    if not found:
        return "–"
    low, high = min(found), max(found)
    return f"{low:.1f}×" if len(found) == 1 else f"{low:.1f} to {high:.1f}×"


def clock_plot(rows: Rows, path: Path) -> Path:
    """Accuracy by virtual hours, mean of the seeds (of three measurements each)."""
    figure, axes = make_axes()
    for index, (cell, own) in enumerate(by_cell(rows).items()):
        colour = COLOURS[index % len(COLOURS)]
        end = min(row["curve"][-1]["seconds"] for row in own)
        start = max(row["curve"][_MEAN_OF - 1]["seconds"] for row in own)
        grid = np.linspace(start, end, 60)
        lines = []
        for row in own:
            scores = np.array([100 * point["accuracy"] for point in row["curve"]])
            smooth = np.convolve(scores, np.ones(_MEAN_OF) / _MEAN_OF, "valid")
            at = [point["seconds"] for point in row["curve"][_MEAN_OF - 1 :]]
            lines.append(np.interp(grid, at, smooth))
        stack = np.stack(lines)
        axes.plot(grid / 3600, stack.mean(axis=0), color=colour, linewidth=1.9, label=cell)
        axes.fill_between(
            grid / 3600, stack.min(axis=0), stack.max(axis=0), color=colour, alpha=0.12
        )
    axes.set_xlabel("virtual hours")
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False, fontsize=8.5)
    return save(figure, path)


def day_table(rows: Rows) -> str:
    """A day of many clients: what was learned, and what it cost the server."""
    lines = []
    for cell, own in by_cell(rows).items():
        first = own[0]
        hours = [row["hours"] for row in own]
        lines.append(
            (
                cell,
                shown([row["accuracy"] for row in own]),
                f"{first['clients_met']:,}",
                f"{first['answers']:,}",
                f"{first['counts'].get('left', 0):,}",
                f"{first['merges']:,}",
                f"{first['merges_a_minute']:.2f}",
                f"{first['seconds_a_merge'][0]:.3f}, {first['seconds_a_merge'][1]:.3f}",
                f"{60 / first['server_seconds_a_merge']:,.0f}",
                f"{max(day[1]['own_mib'] for day in hours):.0f} → "
                f"{max(day[-1]['own_mib'] for day in hours):.0f}",
                f"{first['most_open']:,}",
                str(len(own)),
            )
        )
    columns = (
        "Clients", "Accuracy, %", "clients that answered", "answers", "left before",
        "merges", "a virtual minute", "CPU s a merge: median, 95 %",
        "merges a minute it could do", "own MiB: hour 2 → last", "most plans and updates held",
        "Seeds",
    )  # fmt: skip
    return markdown(columns, lines)
