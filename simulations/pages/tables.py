"""Tables of the results page, as Markdown, from the rows in ``simulations/results``."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dare_agg.runs.words import human_bytes

Rows = Sequence[Mapping[str, Any]]
# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Uplinks in kbit/s; the downlink is taken to be as fast.
LINKS = {"NB-IoT": 20, "LTE-M": 300, "rural ADSL": 700, "LTE Cat-1": 2000}
SIZES = {"22.7 M": 22.7e6, "125 M": 125e6, "1 B": 1e9, "7 B": 7e9}


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
    """Format shares as percent, with the interval and the number of seeds."""
    mean, half = mean_and_interval([100 * v for v in values])
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    return text if half is None else f"{text} ± {half:.1f}"


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


def rounds_to(row: Mapping[str, Any], target: float) -> int | None:
    """First measured round whose accuracy reaches ``target``."""
    return next((p["round"] for p in row["curve"] if p["accuracy"] >= target), None)


# Bytes of a message to a client and its answer besides what they carry, measured with Flower.
MESSAGE_BYTES = 1600


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
