"""Table and picture of merges from updates that carry directions: accuracy by bits."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simulations.pages.plots import COLOURS, make_axes, save
from simulations.pages.tables import Rows, by_cell, markdown, shown

# (drop rate, rank, bits an element)
Way = tuple[str, Any, int]
# Merges of whole deltas, of the merging table.
WHOLE = {
    "average": "average of whole deltas",
    "ties": "TIES of whole deltas",
    "regmean": "RegMean of whole deltas, with data",
    "wudi": "wudi of whole deltas",
}


def scores_of(rows: Rows) -> dict[Way, dict[int, Mapping[str, Any]]]:
    """The points of each way by seed; ways that lack a seed are left out."""
    found: dict[Way, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        for point in row["points"]:
            found[point["drop_rate"], point["rank"], point["bits"]][row["seed"]] = point
    most = max(len(own) for own in found.values())
    return {way: own for way, own in found.items() if len(own) == most}


def bits_of(own: Mapping[int, Mapping[str, Any]]) -> float:
    """Bits a parameter, the mean of the seeds; infinite where no update carries it."""
    sizes = [point["bits_per_parameter"] for point in own.values()]
    return math.inf if None in sizes else math.fsum(sizes) / len(sizes)


def rate_of(way: Way) -> tuple[float, str]:
    """Drop rate, and the words after it."""
    number, comma, words = way[0].partition(",")
    return float(number), f"{comma}{words}"


def words_of(way: Way) -> str:
    """What merges go by."""
    _, rank, bits = way
    if rank == "whole":
        return "wudi, Gram matrices of the whole deltas"
    if rank == 0:
        return "average"
    if rank < 0:
        return "wudi, Gram matrices of the survivors"
    return f"wudi, {rank} directions of {bits} bit{'s' if bits > 1 else ''}"


def gram_table(rows: Rows) -> str:
    """Bits and mean accuracy of every way, and what it adds to the average of the same updates."""
    found = scores_of(rows)
    lines = []
    for way, own in sorted(found.items(), key=lambda item: (rate_of(item[0]), bits_of(item[1]))):
        plain = found[way[0], 0, 0]
        size = bits_of(own)
        lines.append(
            (
                f"{rate_of(way)[0]:g}".lstrip("0") + rate_of(way)[1],
                words_of(way),
                "–" if math.isinf(size) else f"{size:.4f}",
                "–" if math.isinf(size) else f"{32 / size:,.0f}×",
                shown([own[seed]["accuracy"] for seed in sorted(own)]),
                "–"
                if way[1] == 0
                else shown(
                    [own[s]["accuracy"] - plain[s]["accuracy"] for s in sorted(own)], signed=True
                ),
            )
        )
    heads = ("Bits a parameter", "Smaller by", "Accuracy, %", "Over the average")
    return markdown(("p", "Merged by", *heads), lines)


def pictures_table(rows: Rows) -> str:
    """As `gram_table`, with merges of whole deltas of the same rows above."""
    names = list(rows[0]["whole"])
    lines = [(name, shown([row["whole"][name] for row in rows])) for name in names]
    return markdown(("Whole deltas", "Accuracy, %"), lines) + "\n\n" + gram_table(rows)


def rounds_table(rows: Rows) -> str:
    """Rounds of clients with tasks of their own: bits up and mean accuracy, by merge."""
    lines = []
    for cell, own in by_cell(rows).items():
        size = math.fsum(row["bits_per_parameter"] for row in own) / len(own)
        half, last = ([row["curve"][at]["accuracy"] for row in own] for at in (0, -1))
        lines.append((cell, f"{size:.4f}", str(len(own)), shown(half), shown(last)))
    number = rows[0]["curve"][-1]["round"]
    heads = (f"Accuracy after {number // 2} rounds, %", f"after {number}, %")
    return markdown(("Merged by", "Bits a parameter and round", "Seeds", *heads), lines)


def whole_scores(rows: Rows, tasks: Sequence[str]) -> dict[str, float]:
    """Mean accuracy of merges of whole deltas over the same tasks, from the merging table."""
    scores: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for point in row["points"]:
            same = sorted(point["tasks"]) == sorted(tasks) and point["drop_rate"] == "0"
            if same and point["method"] in WHOLE and not point.get("options"):
                scores[WHOLE[point["method"]]].append(point["accuracy"])
        if sorted(row["single"]) == sorted(tasks) and row["cell"] == rows[0]["cell"]:
            own = [row["single"][name] for name in tasks]
            scores["each task's own model"].append(math.fsum(own) / len(own))
    return {words: math.fsum(found) / len(found) for words, found in scores.items()}


def gram_plot(rows: Rows, merging: Rows, path: Path) -> Path:
    """Mean accuracy by bits a parameter, survivors and directions together."""
    figure, axes = make_axes(7.2, 4.6)
    found = scores_of(rows)
    rates = [rate for _, rate in sorted({(rate_of(way), way[0]) for way in found})]
    for index, rate in enumerate(rates):
        colour = COLOURS[(index + 1) % len(COLOURS)]
        marker = "osD^vP"[index % 6]
        points = sorted(
            (bits_of(own), math.fsum(p["accuracy"] for p in own.values()) / len(own), way)
            for way, own in found.items()
            if way[0] == rate and isinstance(way[1], int) and way[1] >= 0
        )
        directed = [(x, 100 * y) for x, y, way in points if way[1] > 0]
        axes.plot(*zip(*directed, strict=True), color=colour, marker=marker,
                  markersize=4.5, linestyle="none", label=f"p = {rate}, directions")  # fmt: skip
        plain = [(x, 100 * y) for x, y, way in points if way[1] == 0]
        axes.plot(*zip(*plain, strict=True), color=colour, marker="x", markersize=7,
                  linestyle="none", markeredgewidth=2)  # fmt: skip
    tasks = list(rows[0]["points"][0]["accuracies"])
    for place, (words, score) in enumerate(whole_scores(merging, tasks).items()):
        style = ("--", ":", "-.", (0, (6, 1, 1, 1)), "-")[place % 5]
        axes.axhline(100 * score, color="#6b7280", linewidth=1, linestyle=style)
        axes.annotate(words, (0.005, 100 * score), xycoords=("axes fraction", "data"), ha="left",
                      va="bottom", fontsize=7.5, color="#4b5563")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("bits a parameter, survivors and directions (log); ×: their average alone")
    axes.set_ylabel("mean accuracy of four tasks, %")
    axes.legend(frameon=False, fontsize=8, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return save(figure, path)
