"""What clients measured task by task: metrics named ``metric:task``, as a table by client and task.

A client whose rows are of several tasks (abilities, labels) tells each metric of all its rows,
and again of each task's as ``loss:arithmetic``, with ``rows:arithmetic`` of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dare_agg.runs.rows import RunRow

TOLD_BY = ":"
ALL = "all clients"
TASK_TITLE = "By client and task, after the last round"
TASK_COLUMNS = ("Client", "Task", "Rows", "Loss", "Perplexity", "Exact match")
_METRICS = ("rows", "loss", "exact-match")
_MOST_CLIENTS = 24  # that are shown one by one
_MOST_ENTRIES = 512  # of a row: of more, the means over all clients alone are kept
# What is not below counts as absent: products of two, and sums of those, are numbers.
_MOST = 1e100


def by_client_and_task(told: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Objects of client, task, rows and metrics, from each client's ``name`` and ``metrics``.

    Of more than `_MOST_ENTRIES` such, the means over all clients.
    """
    found: list[dict[str, Any]] = []
    for one in told:
        tasks: dict[str, dict[str, float]] = {}
        for key, value in one["metrics"].items():
            metric, mark, task = key.partition(TOLD_BY)
            if mark and metric in _METRICS:
                tasks.setdefault(task, {})[metric] = value
        found += [{"client": one["name"], "task": task, **tasks[task]} for task in sorted(tasks)]
    return found if len(found) <= _MOST_ENTRIES else over_clients(found)


def over_clients(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One object a task over all clients: its rows, and each metric's mean weighted by rows.

    Of the first `_MOST_ENTRIES` tasks by name. A count below 0 weighs nothing.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        by_task.setdefault(str(entry.get("task")), []).append(entry)
    found: list[dict[str, Any]] = []
    for task in sorted(by_task)[:_MOST_ENTRIES]:
        own = by_task[task]
        counts = [max(0.0, _number(entry, "rows") or 0.0) for entry in own]
        means: dict[str, Any] = {}
        for metric in _METRICS[1:]:
            values = [_number(entry, metric) for entry in own]
            both = [(n, v) for n, v in zip(counts, values, strict=True) if n and v is not None]
            if both:
                total = math.fsum(count for count, _ in both)
                means[metric] = math.fsum(count * value for count, value in both) / total
        found.append({"client": ALL, "task": task, "rows": sum(counts), **means})
    return found


def task_cells(row: RunRow) -> list[tuple[str, ...]]:
    """The cells of a row's table under `TASK_COLUMNS`: each client, then all by task.

    Of many clients only the means; none at all where clients told nothing by task.
    """
    entries = list(row.by_task)
    if not entries:
        return []
    clients = {str(entry.get("client")) for entry in entries}
    shown = entries if len(clients) <= _MOST_CLIENTS and clients != {ALL} else []
    return [_cells(entry) for entry in [*shown, *over_clients(entries)]]


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    rows, loss, match = (_number(entry, key) for key in _METRICS)
    return (
        str(entry.get("client", "")),
        str(entry.get("task", "")),
        "–" if rows is None else f"{rows:.0f}",
        "–" if loss is None else f"{loss:.3f}",
        "–" if loss is None else f"{math.exp(min(loss, 700.0)):,.2f}",
        "–" if match is None else f"{100 * match:.1f} %",
    )


def _number(entry: Mapping[str, Any], key: str) -> float | None:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -_MOST < value < _MOST else None  # nor is NaN
