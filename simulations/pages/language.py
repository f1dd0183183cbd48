"""Tables and pictures of the language models' part of the results page."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.runs.words import human_bytes
from dare_agg.vectors.sources import SAFE_DELTA
from simulations.pages.plots import COLOURS, make_axes, save
from simulations.pages.tables import Rows, by_cell, markdown, mean_and_interval, shown, verdict

REFERENCE = "FedAvg"
# Nats a token up to which two losses are level.
LEVEL = 0.05


def number(values: Sequence[float], *, signed: bool = False, digits: int = 3) -> str:
    """Format a mean with its 95 % interval, as `tables.shown` does for shares."""
    mean, half = mean_and_interval(values)
    text = f"{mean:{'+' if signed else ''}.{digits}f}"
    if half is None:
        return text
    return f"{text} ± {half:.{digits}f}{verdict(mean, half, LEVEL) if signed else ''}"


# By way of dropping and drop rate: each seed's rise of the loss (None: not finite) over its tuned
# model's, and its change of the next-token accuracy.
Rises = Mapping[str, Mapping[str, Sequence[tuple[float | None, float]]]]


def rises(rows: Rows) -> tuple[Rises, list[tuple[float | None, float]]]:
    """What dropping changed, paired by seed, and what taking the base instead changes."""
    found: dict[str, dict[str, list[tuple[float | None, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    base = {}
    for row in rows:
        tuned, untouched, *points = row["points"]
        for point in points:
            found[point["sweep"]][point["drop_rate"]].append(_rise(point, tuned))
        base[row["seed"]] = _rise(untouched, tuned)
    return found, list(base.values())


def _rise(point: Mapping[str, Any], tuned: Mapping[str, Any]) -> tuple[float | None, float]:
    loss = None if point["loss"] is None else point["loss"] - tuned["loss"]
    return loss, point["accuracy"] - tuned["accuracy"]


def loss_table(rows: Rows) -> str:
    """Rise of the loss by drop rate and way of dropping; in brackets points of accuracy."""
    found, base = rises(rows)
    rates = sorted({rate for own in found.values() for rate in own}, key=float)
    lines = [(rate, *(_change(own.get(rate, [])) for own in found.values())) for rate in rates]
    lines.append(("1 (base)", *(_change(base) for _ in found)))
    return markdown(("Drop rate", *found), lines)


def _change(points: Sequence[tuple[float | None, float]]) -> str:
    losses = [loss for loss, _ in points if loss is not None]
    if not points:
        return "–"
    if len(losses) < len(points):
        return "not finite"
    gained = 100 * float(np.mean([gain for _, gain in points]))
    return f"{number(losses, signed=True)} ({gained:+.1f})"


def loss_plot(rows: Rows, path: Path) -> Path:
    """Rise of the loss by drop rate; what lies far above the base is cut off."""
    figure, axes = make_axes(6.8, 4.2)
    found, base = rises(rows)
    height = float(np.mean([loss for loss, _ in base if loss is not None]))
    top = 2.2 * height
    for index, (name, own) in enumerate(found.items()):
        points = {rate: own[rate] for rate in sorted(own, key=float)}
        x = [-math.log10(1 - float(rate)) for rate in points]
        y = [
            min(top, float(np.mean([math.inf if loss is None else loss for loss, _ in losses])))
            for losses in points.values()
        ]
        axes.plot(x, y, marker="osD^vP"[index % 6], markersize=4.5, linewidth=1.8,
                  color=COLOURS[(index + 2) % len(COLOURS)], label=name)  # fmt: skip
    for name, level, style in (("tuned", 0.0, "--"), ("base", height, ":")):
        axes.axhline(level, color="#6b7280", linestyle=style, linewidth=1.1)
        axes.text(3.03, level, name, va="bottom", fontsize=8.5, color="#6b7280")
    axes.set_ylim(-0.1 * top, top)
    axes.set_xlim(0, 3.2)
    ticks = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 0.999)
    axes.set_xticks([-math.log10(1 - p) for p in ticks])
    axes.set_xticklabels([f"{p:g}".removeprefix("0") for p in ticks])
    axes.set_xlabel("drop rate")
    axes.set_ylabel("rise of the test loss, nats a token")
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
    axes.axvline(math.log10(SAFE_DELTA), color="#be123c", linestyle="--", linewidth=1)
    axes.text(math.log10(SAFE_DELTA) + 0.05, axes.get_ylim()[1] * 0.92, f"{SAFE_DELTA}",
              color="#be123c", fontsize=8.5)  # fmt: skip
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
            rest = f"DARE p={rate}, 1 bit" if rate.count(",") == 0 else "1 bit"
            form = "" if untouched else (", float32" if rate == "0" else f", {rest}")
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
