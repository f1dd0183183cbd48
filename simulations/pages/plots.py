"""Pictures of the results page: small SVG files in ``docs/plots``."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from simulations.pages.tables import Rows, by_cell

COLOURS = (
    "#6b7280", "#9d4edd", "#0b7a75", "#2563eb", "#e07a1f", "#be123c", "#4d7c0f", "#b45309",
    "#0891b2", "#111827", "#d97706", "#16a34a",
)  # fmt: skip


def make_axes(width: float = 6.4, height: float = 4.0) -> tuple[Any, Any]:
    """A figure of this size in inches with one pair of axes in the page's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(True, color="#e6eaf2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    return figure, axes


def save(figure: Any, path: Path, top: float = 1.0) -> Path:
    """Write the figure; ``top`` is the height below which the axes stay."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "dare-agg"}):
        figure.tight_layout(rect=(0, 0, 1, top))
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})
    return path


def federated_plot(rows: Rows, path: Path, *, by_bytes: bool) -> Path:
    """Accuracy by round, or by bytes moved in both directions; mean and range of the seeds."""
    figure, axes = make_axes()
    for index, (cell, own) in enumerate(by_cell(rows).items()):
        numbers = [p["round"] for p in own[0]["curve"]]
        scores = np.array(
            [
                [100 * p["accuracy"] for p in r["curve"]]
                for r in own
                if len(r["curve"]) == len(numbers)
            ]
        )
        if by_bytes:
            x = [(p["upload_bytes"] + p["download_bytes"]) / 1e6 for p in own[0]["curve"]]
        else:
            x = numbers
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(x, scores.mean(axis=0), color=colour, marker="osD^vP*X"[index % 8], markersize=4,
                  linewidth=4.5 if cell == "FedAvg" else 1.9,
                  alpha=0.55 if cell == "FedAvg" else 1, label=cell)  # fmt: skip
        axes.fill_between(x, scores.min(axis=0), scores.max(axis=0), color=colour, alpha=0.12)
    if by_bytes:
        axes.set_xscale("log")
        axes.set_xlabel("megabytes up and down, all clients (log scale)")
    else:
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("test accuracy, %")
    axes.legend(frameon=False, fontsize=8.5)
    return save(figure, path)


def frontier_plot(rows: Rows, path: Path) -> Path:
    """Accuracy by bytes up, down and both ways, for the cells that have all seeds; mean."""
    from matplotlib.figure import Figure

    cells = by_cell(rows)
    most = max(len(own) for own in cells.values())
    cells = {cell: own for cell, own in cells.items() if len(own) == most}
    figure = Figure(figsize=(10.5, 4.6))
    ways = {
        "up": ("upload_bytes",),
        "down": ("download_bytes",),
        "both": ("upload_bytes", "download_bytes"),
    }
    shared = None
    for place, (way, keys) in enumerate(ways.items(), 1):
        axes = figure.add_subplot(1, 3, place, sharey=shared)
        shared = shared or axes
        for index, (cell, own) in enumerate(cells.items()):
            x = [sum(p[k] for k in keys) / 1e6 or math.nan for p in own[0]["curve"]]
            y = np.mean([[100 * p["accuracy"] for p in row["curve"]] for row in own], axis=0)
            dense = cell == "FedAvg"
            axes.plot(x, y, color=COLOURS[index % len(COLOURS)], marker="osD^vP*X"[index % 8],
                      markersize=3, linewidth=3.5 if dense else 1.3, alpha=0.55 if dense else 1,
                      linestyle="--" if cell == "head only" else "-", label=cell)  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel(f"megabytes {way}, all clients", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(True, color="#e6eaf2", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    assert shared is not None
    shared.set_ylabel("test accuracy, %", fontsize=9)
    handles, names = shared.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncol=4, frameon=False, fontsize=8)
    return save(figure, path, top=0.97 - 0.045 * -(-len(names) // 4))


def single_plot(rows: Rows, path: Path) -> Path:
    """Accuracy by drop rate, one panel a task."""
    from matplotlib.figure import Figure

    cells = by_cell(rows)
    across = min(3, len(cells))
    down = -(-len(cells) // across)
    figure = Figure(figsize=(3.3 * across, 3.3 * down))
    for place, (cell, own) in enumerate(cells.items(), 1):
        axes = figure.add_subplot(down, across, place)
        curves: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in own:
            for point in row["points"]:
                if point["sweep"] not in ("tuned", "base"):
                    keep = 1 - float(point["drop_rate"])
                    curves[point["sweep"]][-math.log10(keep)].append(100 * point["accuracy"])
        for index, (sweep, points) in enumerate(curves.items()):
            x = sorted(points)
            axes.plot(x, [np.mean(points[v]) for v in x], marker="osD^vP"[index % 6], markersize=4,
                      color=COLOURS[(index + 2) % len(COLOURS)], label=sweep)  # fmt: skip
        for end, style in ((0, "--"), (1, ":")):  # tuned, base
            height = 100 * np.mean([row["points"][end]["accuracy"] for row in own])
            axes.axhline(height, color="#6b7280", linestyle=style, linewidth=1)
        axes.set_title(cell, fontsize=10)
        axes.set_xticks([-math.log10(1 - p) for p in (0.1, 0.5, 0.9, 0.99, 0.999)])
        axes.set_xticklabels([".1", ".5", ".9", ".99", ".999"], fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_xlabel("drop rate", fontsize=9)
        axes.grid(True, color="#e6eaf2", linewidth=0.8)
        if (place - 1) % across == 0:
            axes.set_ylabel("test accuracy, %", fontsize=9)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncol=len(names), frameon=False, fontsize=8.5)
    return save(figure, path, top=1 - 0.3 / figure.get_figheight())


def rate_plot(rows: Rows, path: Path) -> Path:
    """NMSE with the Gaussian limits, and one-shot accuracy, by bits a parameter; first task."""
    from matplotlib.figure import Figure

    task = rows[0]["task"]
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["task"] == task and "1-D" not in row["method"]:
            families[row["method"]].append(row)
    figure = Figure(figsize=(9.6, 4.6))
    error, accuracy = figure.subplots(1, 2)
    bits = np.geomspace(5e-4, 16, 200)
    error.plot(bits, 1 / (4.0**bits - 1), "k--", linewidth=1.1, label="limit, unbiased (Gaussian)")
    error.plot(bits, 4.0**-bits, "k:", linewidth=1.1, label="Shannon limit, biased (Gaussian)")
    for index, (family, points) in enumerate(families.items()):
        points.sort(key=lambda row: row["bits_per_parameter"])
        for axes, key, factor in ((error, "nmse", 1), (accuracy, "accuracy", 100)):
            shown = [row for row in points if row.get(key, 0) > 0]
            axes.plot([row["bits_per_parameter"] for row in shown],
                      [factor * row[key] for row in shown],
                      "-" if len(shown) > 1 else "", marker="osD^vP*Xdh<>p"[index % 13],
                      markersize=5, linewidth=2.2 if family == "DARE b1" else 1.1,
                      color=COLOURS[index % len(COLOURS)], label=family)  # fmt: skip
    for axes in (error, accuracy):
        axes.set_xscale("log")
        axes.set_xlabel("bits a parameter")
        axes.grid(True, color="#e6eaf2", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    error.set_yscale("log")
    error.set_ylim(1e-6, 3e4)
    error.set_ylabel(f"NMSE of one delta ({task})")
    accuracy.set_ylabel("test accuracy of base + what arrived, %")
    handles, names = error.get_legend_handles_labels()
    accuracy.legend(handles, names, frameon=False, fontsize=7, ncol=2, loc="lower right")
    return save(figure, path)
