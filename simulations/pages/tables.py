"""Tables of the results page, as Markdown, from the rows in ``simulations/results``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dare_agg.runs.words import human_bytes

# Points of accuracy up to which two methods are level.
LEVEL = 2.0
NO_FINDING = ", no finding"
Rows = Sequence[Mapping[str, Any]]
# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, first column left, the others right."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" + " ---: |" * (len(columns) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and the half width of its 95 % confidence interval (None for a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, _T[min(len(values) - 2, len(_T) - 1)] * math.sqrt(variance / len(values))


def shown(values: Sequence[float], *, signed: bool = False) -> str:
    """Format shares as percent with their interval; signed ones are differences, judged."""
    mean, half = mean_and_interval([100 * v for v in values])
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    if half is None:
        return text
    return f"{text} ± {half:.1f}{verdict(mean, half, LEVEL) if signed else ''}"


def verdict(mean: float, half: float, level: float) -> str:
    """What stands behind a difference whose interval covers zero.

    Nothing where it lies within ``level`` of zero: that the two are level is a finding then.
    """
    return NO_FINDING if abs(mean) <= half and abs(mean) + half > level else ""


def by_cell(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Group rows by cell, in order of first appearance, sorted by seed."""
    grouped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[row["cell"]].append(row)
    return {cell: sorted(own, key=lambda r: r["seed"]) for cell, own in grouped.items()}


def accuracy_at(row: Mapping[str, Any], number: int) -> float | None:
    """Accuracy after a round, on the whole test set only."""
    points = [p for p in row["curve"] if p["round"] == number and p["rows"] == row["test_rows"]]
    return points[0]["accuracy"] if points else None


def federated_table(rows: Rows, number: int) -> str:
    """Accuracy after ``number`` rounds and bytes, each cell against FedAvg on the same seeds."""
    cells = by_cell(rows)
    dense = {r["seed"]: accuracy_at(r, number) for r in cells.get("FedAvg", [])}
    lines = []
    for cell, own in cells.items():
        pairs = [(r["seed"], accuracy_at(r, number)) for r in own]
        scores = {seed: value for seed, value in pairs if value is not None}
        if not scores:
            continue
        gaps = [v - dense[s] for s, v in scores.items() if dense.get(s) is not None]
        first = own[0]
        upload = first["upload_bytes_per_client_round"]
        ratio = 4 * first["parameters"] / upload if upload else None
        lines.append(
            (
                cell,
                shown(list(scores.values())),
                "–" if cell == "FedAvg" or not gaps else shown(gaps, signed=True),
                human_bytes(upload) if upload else "–",
                "–" if ratio is None else f"{ratio:,.0f}×",
                human_bytes(first["head_bytes_per_client_round"]),
                human_bytes(first["download_bytes_per_client_round"]) if upload else "–",
                str(len(scores)),
            )
        )
    columns = (
        "Method",
        "Accuracy, %",
        "minus FedAvg, points",
        "Upload a client and round",
        "Smaller by",
        "Head, extra",
        "Download a client and round",
        "Seeds",
    )
    return markdown(columns, lines)


SINGLE_RATES = ("0.1", "0.3", "0.5", "0.7", "0.9", "0.99", "0.999")


def single_table(rows: Rows) -> str:
    """Change of accuracy by sweep and drop rate, paired by seed, one block a task."""
    lines = []
    for cell, own in by_cell(rows).items():
        ends: dict[str, list[float]] = defaultdict(list)
        gaps: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in own:
            tuned, base, *points = row["points"]
            ends["tuned"].append(tuned["accuracy"])
            ends["base"].append(base["accuracy"])
            for point in points:
                gap = point["accuracy"] - tuned["accuracy"]
                gaps[point["sweep"]][point["drop_rate"]].append(gap)
        head = ", ".join(f"{name} {shown(values)}" for name, values in ends.items())
        lines.append((f"**{cell}**: {head}", *("" for _ in SINGLE_RATES)))
        for sweep, found in gaps.items():
            cells = (shown(found[r], signed=True) if r in found else "–" for r in SINGLE_RATES)
            lines.append((sweep, *cells))
    return markdown(("points from tuned", *(f"p = {rate}" for rate in SINGLE_RATES)), lines)


def hard_table(rows: Rows) -> str:
    """Change of accuracy by way and bits a parameter, paired by seed, one block a task.

    A cell's task is what stands before the colon of its name; where seeds are fewer, it is said.
    """
    budgets = sorted({p["bits"] for row in rows for p in row["points"][2:]}, reverse=True)
    lines = []
    tasks: dict[str, list[Any]] = defaultdict(list)
    for cell, own in by_cell(rows).items():
        tasks[cell.partition(": ")[0]] += own
    for cell, own in tasks.items():
        gaps: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        once = list({row["seed"]: row for row in own}.values())
        ends = [[100 * row["points"][end]["accuracy"] for row in once] for end in (0, 1)]
        for row in own:
            tuned, _, *points = row["points"]
            for point in points:
                gap = point["accuracy"] - tuned["accuracy"]
                gaps[point["way"]][point["bits"]].append(gap)
        tuned, base = (f"{sum(values) / len(values):.1f}" for values in ends)
        seeds = f"{len(once)} seed{'s' if len(once) > 1 else ''}"
        lines.append((f"**{cell}**: tuned {tuned}, base {base}; {seeds}", *("" for _ in budgets)))
        for way, found in gaps.items():
            cells = []
            for bits in budgets:
                few = f" ({len(found[bits])})" if 0 < len(found[bits]) < len(once) else ""
                cells.append(shown(found[bits], signed=True) + few if found[bits] else "–")
            lines.append((way, *cells))
    columns = ("points from tuned", *(f"{b:g} bit a parameter" for b in budgets))
    return markdown(columns, lines)


def delta_table(rows: Rows) -> str:
    """The range of each tuned model's delta, mean over the seeds."""
    lines = []
    for cell, own in by_cell(rows).items():

        def average(*path: str, own: Rows = own) -> float:
            found: list[Any] = [row["delta"] for row in own]
            for key in path:
                found = [value[key] for value in found]
            return math.fsum(found) / len(found)

        lines.append(
            (
                cell,
                f"{average('quantiles', '0.5'):.5f}",
                f"{average('quantiles', '0.99'):.5f}",
                f"{average('quantiles', '1.0'):.4f}",
                f"{100 * average('share_above_0.005'):.3f} %",
                f"{100 * average('exact_zeros'):.1f} %",
            )
        )
    columns = ("Task", "median", "99 %", "largest", "above 0.005", "exactly 0")
    return markdown(columns, lines)


def merging_table(rows: Rows) -> str:
    """Mean accuracy over the merged tasks by method, and what adding DARE changes (paired)."""
    scores: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    ends: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for point in row["points"]:
            words = point["method"]
            if point["scaling"] != 1 or words == "task-arithmetic":
                words += f", λ {point['scaling']:g}"
            if words == "ties" and "normalize" in point.get("options", {}):
                words += " by the expected count, untrimmed"
            if words == "wudi" and point.get("options", {}).get("gram") == "dropped":
                words += ", Gram matrices of the survivors"
            column = (" + ".join(point["tasks"]), point["drop_rate"])
            scores[words][column].append(point["accuracy"])
        for tasks in dict.fromkeys(tuple(p["tasks"]) for p in row["points"]):
            for words, found in (("single", "each task's own model"), ("base", "base, own heads")):
                mean = math.fsum(row[words][name] for name in tasks) / len(tasks)
                if row["cell"] == rows[0]["cell"]:
                    ends[f"*{found}*"][" + ".join(tasks), "0"].append(mean)
    found = {column for own in scores.values() for column in own}
    columns = sorted(found, key=lambda c: (c[0].count("+"), c[0], float(c[1])))

    def cell(own: Mapping[tuple[str, str], list[float]], column: tuple[str, str]) -> str:
        if column not in own:
            return "–"
        if column[1] == "0":
            return shown(own[column])
        pairs = zip(own[column], own[column[0], "0"], strict=True)
        return shown([after - before for after, before in pairs], signed=True)

    lines = [
        (words, *(cell(own, column) for column in columns))
        for words, own in (*scores.items(), *ends.items())
    ]
    heads = [tasks if rate == "0" else f"DARE p={rate} changes it by" for tasks, rate in columns]
    return markdown(("Method", *heads), lines)


def rate_table(rows: Rows) -> str:
    """Every way to send one delta, by bits a parameter."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    grouped: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["method"], row["setting"]), {})[row["task"]] = row
    lines = []
    for (method, setting), own in sorted(
        grouped.items(), key=lambda item: next(iter(item[1].values()))["bits_per_parameter"]
    ):
        first = next(iter(own.values()))
        cells = []
        for task in tasks:
            found = own.get(task)
            cells.append(f"{found['nmse']:.3g}" if found else "–")
            cells.append(f"{100 * found['accuracy']:.1f}" if found else "–")
        lines.append((f"{method} {setting}".strip(), f"{first['bits_per_parameter']:.4f}", *cells))
    heads = [text for task in tasks for text in (f"{task}: NMSE", "accuracy, %")]
    return markdown(("Method", "bits a parameter", *heads), lines)
