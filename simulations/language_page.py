"""Tables and pictures of the language models' part of the results page."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.cli.output import human_bytes
from simulations.plots import COLOURS, make_axes, save
from simulations.tables import Rows, by_cell, markdown, mean_and_interval, shown

REFERENCE = "FedAvg"
ENDS = ("tuned", "base")


def number(values: Sequence[float], *, signed: bool = False, digits: int = 3) -> str:
    """Format a mean with its 95 % interval, as `tables.shown` does for shares."""
    mean, half = mean_and_interval(values)
    text = f"{mean:{'+' if signed else ''}.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def sweeps(rows: Rows) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Points of all cells by sweep and drop rate, each with its row's ends."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        tuned, base = row["points"][:2]
        for point in row["points"][2:]:
            kept = None
            if point["loss"] is not None:
                kept = (base["loss"] - point["loss"]) / (base["loss"] - tuned["loss"])
            found[point["sweep"]][point["drop_rate"]].append({**point, "kept": kept})
    return found


def ends(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """The tuned and the base model's points, one a seed."""
    one = {row["seed"]: row for row in rows}
    return {name: [row["points"][i] for row in one.values()] for i, name in enumerate(ENDS)}


def loss_table(rows: Rows) -> str:
    """Loss and next-token accuracy by drop rate and way of dropping."""
    found, bounds = sweeps(rows), ends(rows)
    names = list(found)
    rates = sorted({rate for own in found.values() for rate in own}, key=float)
    lines = [_both("0 (tuned)", [bounds["tuned"]] * len(names))]
    lines += [_both(rate, [found[name].get(rate, []) for name in names]) for rate in rates]
    lines.append(_both("1 (base)", [bounds["base"]] * len(names)))
    return markdown(("Drop rate", *names), lines)


def _both(head: str, cells: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[str, ...]:
    def cell(points: Sequence[Mapping[str, Any]]) -> str:
        if not points:
            return "–"
        if any(point["loss"] is None for point in points):
            return "not finite"
        loss = number([point["loss"] for point in points])
        return f"{loss} ({100 * np.mean([p['accuracy'] for p in points]):.1f})"

    return (head, *(cell(points) for points in cells))


def loss_plot(rows: Rows, path: Path) -> Path:
    """Loss by drop rate; what lies far above the base is cut off."""
    figure, axes = make_axes(6.8, 4.2)
    bounds = {name: np.mean([p["loss"] for p in points]) for name, points in ends(rows).items()}
    top = bounds["base"] + 1.2 * (bounds["base"] - bounds["tuned"])
    for index, (name, own) in enumerate(sweeps(rows).items()):
        points = {rate: own[rate] for rate in sorted(own, key=float)}
        x = [-math.log10(1 - float(rate)) for rate in points]
        y = [
            np.mean([p["loss"] if p["loss"] is not None else math.inf for p in found])
            for found in points.values()
        ]
        shown_y = [min(value, top) for value in y]
        axes.plot(x, shown_y, marker="osD^vP"[index % 6], markersize=4.5, linewidth=1.8,
                  color=COLOURS[(index + 2) % len(COLOURS)], label=name)  # fmt: skip
    for name, style in (("tuned", "--"), ("base", ":")):
        axes.axhline(bounds[name], color="#6b7280", linestyle=style, linewidth=1.1)
        axes.text(3.03, bounds[name], name, va="bottom", fontsize=8.5, color="#6b7280")
    axes.set_ylim(bounds["tuned"] - 0.1 * (top - bounds["tuned"]), top)
    axes.set_xlim(0, 3.2)
    ticks = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 0.999)
    axes.set_xticks([-math.log10(1 - p) for p in ticks])
    axes.set_xticklabels([f"{p:g}".removeprefix("0") for p in ticks])
    axes.set_xlabel("drop rate")
    axes.set_ylabel("test loss, nats a token")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    return save(figure, path)


def delta_plot(rows: Rows, path: Path) -> Path:
    """Histogram of a delta's absolute values, one curve a cell that has one."""
    figure, axes = make_axes(6.4, 3.4)
    drawn = set()
    for row in rows:
        label = f"{row['task']}, {row['parameters'] / 1e6:.1f} M"
        if "log10_shares" not in row["delta"] or label in drawn:
            continue
        edges = np.array(row["delta"]["log10_edges"])
        colour = COLOURS[(len(drawn) + 2) % len(COLOURS)]
        axes.stairs(100 * np.array(row["delta"]["log10_shares"]), edges, color=colour,
                    label=label, linewidth=1.6)  # fmt: skip
        drawn.add(label)
    axes.axvline(math.log10(0.005), color="#be123c", linestyle="--", linewidth=1)
    axes.text(math.log10(0.005) + 0.05, axes.get_ylim()[1] * 0.92, "0.005", color="#be123c",
              fontsize=8.5)  # fmt: skip
    axes.set_xlim(-8, -1)
    axes.set_xticks(range(-8, 0))
    axes.set_xticklabels([f"$10^{{{k}}}$" for k in range(-8, 0)])
    axes.set_xlabel("|δ| of an element that moved")
    axes.set_ylabel("% of all elements")
    if len(drawn) > 1:
        axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    return save(figure, path)


def federated_loss_table(rows: Rows) -> str:
    """Final loss and bytes of each cell; cells are named "kind, method"."""
    cells = by_cell(rows)
    lines = []
    for cell, own in cells.items():
        kind = cell.partition(", ")[0]
        dense = {r["seed"]: r["curve"][-1] for r in cells.get(f"{kind}, {REFERENCE}", [])}
        last = {r["seed"]: r["curve"][-1] for r in own}
        gaps = [p["loss"] - dense[s]["loss"] for s, p in last.items() if s in dense]
        first = own[0]
        upload = first["upload_bytes_per_client_round"]
        reference = cell.endswith(REFERENCE)
        losses = [p["loss"] for p in last.values()]
        lines.append(
            (
                cell,
                number(losses),
                f"{math.exp(np.mean(losses)):.1f}",
                "–" if reference or not gaps else number(gaps, signed=True),
                shown([p["accuracy"] for p in last.values()]),
                human_bytes(upload) if upload else "–",
                f"{4 * first['parameters'] / upload:,.0f}×" if upload else "–",
                human_bytes(first["download_bytes_per_client_round"]) if upload else "–",
                str(len(own)),
            )
        )
    columns = (
        "Method",
        "Loss",
        "Perplexity",
        "minus FedAvg",
        "Next token, %",
        "Upload a client and round",
        "Smaller by",
        "Download",
        "Seeds",
    )
    return markdown(columns, lines)


def adapters_table(rows: Rows) -> str:
    """Loss, error and bytes of merging factors or products, with and without DARE."""
    lines = []
    for cell, own in by_cell(rows).items():
        found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
        for row in own:
            for point in row["points"]:
                found[point["way"], point["drop_rate"]].append(point)
        for (way, rate), points in found.items():
            untouched = way.startswith("untouched")
            form = "" if untouched else (", float32" if rate == "0" else f", DARE p={rate}, 1 bit")
            losses = [p["loss"] for p in points]
            lines.append(
                (
                    cell,
                    way + form,
                    human_bytes(points[0]["bytes"]) if not untouched else "–",
                    f"{np.mean([p['nmse'] for p in points]):.2g}",
                    number(losses),
                    shown([p["accuracy"] for p in points]),
                    str(len(points)),
                )
            )
    columns = ("Start", "What is averaged", "Upload", "NMSE", "Loss", "Next token, %", "Seeds")
    return markdown(columns, lines)


def sizes_table(rows: Rows, small: Rows) -> str:
    """The share of the gain of tuning that is left after DARE, by model.

    ``small`` are the rows of the small language model, which has a scenario of its own.
    """
    rates = sorted({p["drop_rate"] for row in rows for p in row["points"][2:]}, key=float)
    dared = [row for row in small if any(p["sweep"] == "dare" for p in row["points"])]
    cells = by_cell([*rows, *({**row, "cell": "SmolLM2, 135 M"} for row in dared)])
    lines = []
    for cell, own in cells.items():
        kept: dict[str, list[float]] = defaultdict(list)
        language = own[0]["task"] == "friends"
        key = "loss" if language else "accuracy"
        for row in own:
            tuned, base = (row["points"][i][key] for i in (0, 1))
            for point in row["points"]:
                if point["sweep"] == "dare" and point[key] is not None:
                    kept[point["drop_rate"]].append((point[key] - base) / (tuned - base))
        start, end = ([row["points"][i][key] for row in own] for i in (1, 0))
        gain = (
            f"loss {np.mean(start):.2f} → {np.mean(end):.2f}"
            if language
            else f"accuracy {100 * np.mean(start):.1f} → {100 * np.mean(end):.1f} %"
        )
        shares = [shown(kept[rate]) if rate in kept else "–" for rate in rates]
        median = np.mean([row["delta"]["quantiles"]["0.5"] for row in own])
        lines.append((cell, gain, f"{median:.1e}", *shares, str(len(own))))
    return markdown(
        ("Model", "base → tuned", "median |δ|", *(f"p={rate}" for rate in rates), "Seeds"), lines
    )
