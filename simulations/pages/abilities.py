"""Tables and picture of the abilities that one merged decoder keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.runs.words import human_bytes
from simulations.pages.plots import COLOURS, save
from simulations.pages.tables import Rows, by_cell, markdown, mean_and_interval
from simulations.runs.ability_data import ABILITIES

Point = Mapping[str, Any]
# What a score is called, and which of an ability's scores counts: the share of right answers, or
# the loss.
MEASURES = {"arithmetic": "exact"}
GRAMS = {"own": "", "whole": ", Gram matrices of whole deltas", "directions": ", directions"}


def value(name: str, scores: Mapping[str, Mapping[str, float]]) -> float:
    """The score of an ability that counts."""
    return scores[name][MEASURES.get(name, "loss")]


def alone(rows: Rows, split: str = "test") -> dict[int, dict[str, Mapping[str, Any]]]:
    """By seed and model (the base, each ability's own) its scores."""
    return {
        row["seed"]: {point["model"]: point["scores"] for point in row["points"]}
        for row in rows
        if row["split"] == split and "model" in row["points"][0]
    }


def kept(point: Point, seed: int, single: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """The share of each ability's gain that a merged model keeps: 1 for its own model's."""
    found = {}
    for name in point["set"]:
        base, own = (value(name, single[seed][model]) for model in ("base", name))
        found[name] = (value(name, point["scores"]) - base) / (own - base)
    return found


def merged(rows: Rows, split: str = "test") -> dict[tuple, list[tuple[int, Point]]]:
    """All merged points of a split by what was sent and how it was merged, with their seeds."""
    found: dict[tuple, list[tuple[int, Point]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["split"] != split:
            continue
        for point in row["points"]:
            if "set" in point:
                found[(tuple(point["set"]), *label(point, row))].append((row["seed"], point))
    return dict(found)


def label(point: Point, row: Mapping[str, Any]) -> tuple[str, str]:
    """What was sent, and the method with what it was told."""
    told = dict(point["options"])
    if point["scaling"] != 1:
        told = {"λ": point["scaling"], **told}
    words = "".join(
        f", {key} {number:g}" if not isinstance(number, str) else f", {number}"
        for key, number in told.items()
    )
    return sent(point, row), point["method"] + words + GRAMS.get(point["gram"], "")


def sent(point: Point, row: Mapping[str, Any]) -> str:
    """What each model sent, in a few words."""
    rate = point["drop_rate"]
    text = "whole delta" if rate == "0" else f"p={rate.removeprefix('0')}, {form(point['values'])}"
    if point["gram"] == "directions":
        text += f" + {row['update']['rank']} directions of {row['update']['bits']} bits"
    return text + (", no embeddings" if point["exclude"] else "")


def form(values: str) -> str:
    """A value format in words."""
    return {"b1": "1 bit", "f32": "float32"}.get(values, values)


def abilities_table(rows: Rows) -> str:
    """Score and share of the gain kept of each ability, by what was sent and method; all three."""
    names = list(ABILITIES)
    single = alone(rows)
    lines = []
    for model in ("base", "own"):
        lines.append(
            (
                "–" if model == "base" else "whole delta",
                "the base" if model == "base" else "each ability's own model",
                "–" if model == "base" else "32",
                *(
                    _cell(
                        [
                            value(n, own["base" if model == "base" else n])
                            for own in single.values()
                        ],
                        n,
                    )
                    for n in names
                ),
                "–" if model == "base" else "100",
                str(len(single)),
            )
        )
    for (which, what, method), points in merged(rows).items():
        if len(which) != len(names):
            continue
        shares = [kept(point, seed, single) for seed, point in points if seed in single]
        if not shares:
            continue
        lines.append(
            (
                what,
                method,
                f"{np.mean([point['bits_per_parameter'] for _, point in points]):.3g}",
                *(
                    f"{_cell([value(n, p['scores']) for _, p in points], n)} "
                    f"({_percent([s[n] for s in shares])})"
                    for n in names
                ),
                _percent([min(s.values()) for s in shares]),
                str(len(points)),
            )
        )
    columns = (
        "What each model sends",
        "Method",
        "Bits a parameter",
        "Arithmetic, exact match, %",
        "Code, loss",
        "Dialogue, loss",
        "Least kept, %",
        "Seeds",
    )
    return markdown(columns, lines)


def pairs_table(rows: Rows) -> str:
    """Shares of the gain that sets of two keep, in percent: one ability / the other."""
    single = alone(rows)
    pairs: dict[tuple[str, str], dict[tuple, str]] = defaultdict(dict)
    sets: list[tuple] = []
    for (which, what, method), points in merged(rows).items():
        if len(which) != 2:
            continue
        sets += [which] if which not in sets else []
        shares = [kept(point, seed, single) for seed, point in points if seed in single]
        pairs[what, method][which] = " / ".join(_percent([s[n] for s in shares]) for n in which)
    lines = [(*key, *(own.get(which, "–") for which in sets)) for key, own in pairs.items()]
    return markdown(("What each model sends", "Method", *map(" + ".join, sets)), lines)


def rounds_table(rows: Rows) -> str:
    """What each ability is at after the last round of a federation, and the bytes it took.

    In brackets the share of FedAvg's gain of the same seed.
    """
    dense = {row["seed"]: row["curve"] for row in rows if row["method"] == "fedavg"}
    seeds = list({row["seed"]: row for row in rows}.values())  # all begin alike
    lines = [("before", "–", "–", *_after([row["curve"][0] for row in seeds], seeds, {}), "–")]
    for cell, own in by_cell(rows).items():
        first = own[0]
        upload = first["upload_bytes_per_client_round"]
        lines.append(
            (
                cell,
                human_bytes(upload),
                f"{4 * first['parameters'] / upload:,.0f}×",
                *_after([row["curve"][-1] for row in own], own, dense),
                str(len(own)),
            )
        )
    names = ("Arithmetic, exact match, %", "Code, loss", "Dialogue, loss")
    return markdown(("", "Upload a client and round", "less by", *names, "Seeds"), lines)


def _after(points: Sequence[Point], rows: Rows, dense: Mapping[int, Sequence[Point]]) -> list[str]:
    cells = []
    for name in ABILITIES:
        text = _cell([value(name, point["scores"]) for point in points], name)
        shares = [
            (value(name, point["scores"]) - base) / (value(name, end["scores"]) - base)
            for point, row in zip(points, rows, strict=True)
            if row["seed"] in dense and row["method"] != "fedavg"
            for end in [dense[row["seed"]][-1]]
            for base in [value(name, row["curve"][0]["scores"])]
        ]
        cells.append(f"{text} ({_percent(shares)})" if shares else text)
    return cells


def abilities_plot(rows: Rows, path: Path) -> Path:
    """Share of each ability's gain that one model of all three keeps, by bits a parameter."""
    from matplotlib.figure import Figure

    single = alone(rows)
    names = list(ABILITIES)
    figure = Figure(figsize=(10.5, 3.9))
    curves: dict[str, list[tuple[float, list[dict[str, float]]]]] = defaultdict(list)
    for (which, _, method), points in merged(rows).items():
        shares = [kept(point, seed, single) for seed, point in points if seed in single]
        if len(which) == len(names) and shares and points[0][1]["gram"] != "whole":
            bits = float(np.mean([point["bits_per_parameter"] for _, point in points]))
            curves[method].append((bits, shares))
    first = None
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, 3, place, sharey=first)
        first = first or axes
        for index, (method, found) in enumerate(curves.items()):
            ordered = sorted(found, key=lambda pair: pair[0])
            x = [bits for bits, _ in ordered]
            y = [100 * float(np.mean([s[name] for s in shares])) for _, shares in ordered]
            axes.plot(
                x,
                y,
                color=COLOURS[index % len(COLOURS)],
                marker="osD^vP*X"[index % 8],
                markersize=4.5,
                linewidth=1.5,
                label=method,
            )
        axes.axhline(100, color="#6b7280", linestyle="--", linewidth=1)
        axes.axhline(0, color="#6b7280", linestyle=":", linewidth=1)
        axes.set_ylim(-30, 115)
        axes.set_xscale("log")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("bits a parameter (log scale)", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(True, color="#e6eaf2", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    assert first is not None
    first.set_ylabel("% of the gain kept", fontsize=9)
    handles, texts = first.get_legend_handles_labels()
    figure.legend(handles, texts, loc="upper center", ncol=4, frameon=False, fontsize=8)
    return save(figure, path, top=0.97 - 0.045 * -(-len(texts) // 4))


def _cell(values: Sequence[float], name: str) -> str:
    """The mean of the seeds, with its interval from three on."""
    factor, places = (100, 1) if name in MEASURES else (1, 3)
    mean, half = mean_and_interval([factor * v for v in values])
    interval = f" ± {half:.{places}f}" if half is not None and len(values) > 2 else ""
    return f"{mean:.{places}f}{interval}"


def _percent(shares: Sequence[float]) -> str:
    """Shares in percent: each seed's of one or two, else their mean and its interval."""
    if len(shares) < 3:
        return " and ".join(f"{100 * share:.0f}" for share in shares)
    mean, half = mean_and_interval([100 * share for share in shares])
    return f"{mean:.0f} ± {half:.0f}"
