"""All that a page of runs shows, as one object of plain values; the browser draws it.

A report has it in its file, `dare_agg.runs.watch` sends it again and again while a run goes on.
Clients' words stand in it as they are: what draws it takes every string for text, never for HTML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dare_agg import __version__
from dare_agg.errors import plain_line
from dare_agg.runs.answers import Answers
from dare_agg.runs.by_task import TASK_COLUMNS, TASK_TITLE, task_cells
from dare_agg.runs.missed import MISSED_COLUMNS, MISSED_TITLE, missed_cells
from dare_agg.runs.now import Now
from dare_agg.runs.report.clients import CLIENT_COLUMNS, client_cells
from dare_agg.runs.report.measures import ACCURACY, PERPLEXITY, measure_of
from dare_agg.runs.report.records import RunRecord
from dare_agg.runs.report.series import coinciding, run_series, target_of, totals
from dare_agg.runs.report.table import (
    LANGUAGE_NOTE,
    TABLE_NOTE,
    table_columns,
    table_row,
)
from dare_agg.runs.words import human_bytes
from dare_agg.vectors.sources import SAFE_DELTA

TOTALS = ("Up in all", "Down in all", "Both ways")
# Names of runs and (key, its value in each), where runs are compared.
Settings = tuple[Sequence[str], Sequence[tuple[str, Sequence[str]]]]


def page_facts(
    runs: Sequence[RunRecord],
    *,
    title: str,
    lead: str,
    command: str = "",
    answers: Sequence[Answers] = (),
    settings: Settings | None = None,
    now: Now | None = None,
) -> dict[str, Any]:
    """The facts of one run's methods, or of several runs side by side."""
    measure = measure_of(runs)
    # What the models before the first round measure is known of one source of data alone.
    told = [perplexity for one in answers for _, perplexity, _ in one.models[:1]]
    before = told[0] if measure is PERPLEXITY and len(told) == 1 else None
    return _plain(
        {
            "title": title,
            "lead": lead,
            "cards": _cards(runs),
            "table": _table(
                (*table_columns(runs), *TOTALS),
                [
                    [run.name, *table_row(run, runs), *(human_bytes(n) for n in _moved(run))]
                    for run in runs
                ],
            ),
            "tableNote": LANGUAGE_NOTE if measure is PERPLEXITY else TABLE_NOTE,
            "main": "accuracy" if measure is ACCURACY else "perplexity",
            "target": target_of(runs),
            "before": before,
            "series": [run_series(run) for run in runs],
            "histograms": [_histogram(run) for run in runs],
            "safeDelta": SAFE_DELTA,
            "coinciding": coinciding(runs, before),
            "clients": [
                {"name": run.name, "round": run.rows[-1].round, "columns": CLIENT_COLUMNS,
                 "rows": found}
                for run in runs
                if run.rows and (found := client_cells(run.rows[-1], _of(now, run)))
            ],
            "missed": {
                "title": MISSED_TITLE,
                **_table(MISSED_COLUMNS, missed_cells([row for run in runs for row in run.rows])),
            },
            "tasks": [
                {"title": f"{run.name}: {TASK_TITLE[0].lower()}{TASK_TITLE[1:]}",
                 **_table(TASK_COLUMNS, cells)}
                for run in runs
                if run.rows and (cells := task_cells(run.rows[-1]))
            ],
            "warnings": [
                f"{run.name}, round {row.round}: {row.noise_warning}"
                for run in runs
                for row in run.rows
                if row.noise_warning
            ],
            "settings": None
            if settings is None or not settings[1]
            else _table(
                ("Key", *settings[0]), [[key, *values] for key, values in settings[1]]
            ),
            "answers": [_answers(one) for one in answers],
            "provenance": _provenance(runs),
            "footer": f"dare-agg {__version__}" + (f" · made by: {command}" if command else ""),
        }
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """The value with each string as printable lines, and nothing that JSON has not."""
    if isinstance(value, str):
        return "\n".join(map(plain_line, value.split("\n")))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {"columns": list(columns), "rows": [list(row) for row in rows]}


def _moved(run: RunRecord) -> tuple[float, float, float]:
    up, down = totals(run)
    return up, down, up + down


def _of(now: Now | None, run: RunRecord) -> Now | None:
    return now if now is not None and now.method == run.method else None


def _histogram(run: RunRecord) -> dict[str, Any] | None:
    if run.histogram is None:
        return None
    edges, counts = run.histogram
    total = max(1, sum(counts))
    return {"edges": [round(x, 6) for x in edges], "shares": [100 * n / total for n in counts]}


def _answers(one: Answers) -> dict[str, Any]:
    heads = []
    for name, perplexity, match in one.models:
        said = [name]
        said += [f"perplexity {perplexity:,.2f}"] if perplexity is not None else []
        said += [f"exact match {100 * match:.1f} %"] if match is not None else []
        heads.append(", ".join(said))
    return {
        "title": f"Answers side by side: {one.data}",
        **_table(("Question", "Wanted", *heads), one.lines),
        "right": [list(line) for line in one.right],
        "note": "Test questions, answered greedily. Perplexity is of "
        f"{one.rows} test rows, exact match of {one.answered} of them.",
    }


def _provenance(runs: Sequence[RunRecord]) -> str:
    parts = []
    for run in runs:
        record = {"fingerprint": run.fingerprint, **run.config}
        parts.append(f"{run.name}\n{json.dumps(record, indent=2, default=str)}")
    return "\n\n".join(parts)


def _cards(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    measure = measure_of(runs)
    dense = next((r for r in runs if r.name.lower().startswith("fedavg")), None)
    control = next((r for r in runs if "head" in r.name.lower()), None)
    values = {
        run.name: value
        for run in runs
        if run not in (dense, control) and (value := measure.last(run)) is not None
    }
    if not values:
        return []
    value = measure.better(list(values.values()))
    best = next(run for run in runs if values.get(run.name) == value)
    cards = [{"figure": measure.shown(value), "text": f"{measure.title.lower()}, {best.name}"}]
    if best.upload:
        cards.append(
            {
                "figure": f"{4 * best.parameters / best.upload:,.0f}×",
                "text": f"smaller upload: {human_bytes(best.upload)} instead of "
                f"{human_bytes(4 * best.parameters)}",
            }
        )
    for other, text in (
        (dense, "against dense FedAvg"),
        (control, "against training the head alone"),
    ):
        if other is not None and (found := measure.last(other)) is not None:
            if measure is ACCURACY:
                cards.append({"figure": f"{100 * (value - found):+.1f} points", "text": text})
            elif found:
                cards.append({"figure": f"{100 * (value / found - 1):+.1f} %", "text": text})
    return cards
