"""The HTML page of one or more runs: a table and pictures in one file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dare_agg import __version__
from dare_agg.files.atomic import replace_file
from dare_agg.runs.answers import Answers
from dare_agg.runs.by_task import TASK_COLUMNS, TASK_TITLE, task_cells
from dare_agg.runs.missed import MISSED_COLUMNS, MISSED_TITLE, missed_cells
from dare_agg.runs.report.measures import (
    ACCURACY,
    PERPLEXITY,
    Measure,
    further_measures,
    measure_of,
)
from dare_agg.runs.report.pictures import (
    colour_of,
    delta_histogram,
    measure_by_megabytes,
    measure_by_round,
    sign_conflict,
)
from dare_agg.runs.report.records import RunRecord
from dare_agg.runs.rows import sent_words
from dare_agg.runs.words import human_bytes
from dare_agg.vectors.sources import SAFE_DELTA

_BYTES = ("Upload / client / round", "Smaller by")
_HEAD = "Dense head, extra"
_SENT = "Sent, last round"
_REST = ("Download / client / round", "Seconds")


def table_columns(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """The columns of a table of runs, the method's name first."""
    measures = (measure_of(runs), *further_measures(runs))
    head = () if measures[0] is PERPLEXITY else (_HEAD,)
    sent = (_SENT,) if any(map(_sent, runs)) else ()
    return ("Method", *(measure.title for measure in measures), *sent, *_BYTES, *head, *_REST)


def _sent(run: RunRecord) -> str:
    return sent_words(run.rows[-1]) if run.rows else ""


def table_row(run: RunRecord, runs: Sequence[RunRecord] = ()) -> list[str]:
    """The cells of a run under `table_columns` of all runs, without its name."""
    runs = runs or (run,)
    measures = (measure_of(runs), *further_measures(runs))
    ratio = 4 * run.parameters / run.upload if run.upload else None
    head = human_bytes(run.head_upload) if run.head_upload else "–"
    return [
        *(_shown_last(measure, run) for measure in measures),
        *([_sent(run) or "–"] if any(map(_sent, runs)) else []),
        human_bytes(run.upload) if run.upload else "–",
        "–" if ratio is None else f"{ratio:,.0f}×" if ratio > 1.05 else "1×",
        *([] if measures[0] is PERPLEXITY else [head]),
        human_bytes(run.download),
        f"{run.seconds:.0f}",
    ]


def _shown_last(measure: Measure, run: RunRecord) -> str:
    value = measure.last(run)
    return "–" if value is None else measure.shown(value)


TABLE_NOTE = (
    "Upload is the encoded update of the fine-tuned encoder, as it travels. The small dense head "
    "is averaged with every value and counted in its own column. “Smaller by” compares with the "
    "encoder's parameters in float32. “Head only” never changes the encoder: what lies above that "
    "row is what the compact updates achieved."
)


LANGUAGE_NOTE = (
    "Upload is the encoded update as it travels. “Smaller by” compares with the trained parameters "
    "in float32. Perplexity is that of the answers alone, e to the mean loss a token of the test "
    "rows; exact match is that of greedily generated answers."
)


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


def write_report(
    path: Path,
    runs: Sequence[RunRecord],
    *,
    title: str,
    lead: str,
    command: str = "",
    answers: Sequence[Answers] = (),
    settings: tuple[Sequence[str], Sequence[tuple[str, Sequence[str]]]] | None = None,
) -> Path:
    """Write the page to ``path`` and return it; figures without data are left out.

    ``settings`` are the names of runs and (key, its value in each), where runs are compared.

    ``answers`` to test questions, where there are any, stand side by side.
    """
    measure = measure_of(runs)
    # What the models before the first round measure is known of one source of data alone.
    told = [perplexity for one in answers for _, perplexity, _ in one.models[:1]]
    before = told[0] if measure is PERPLEXITY and len(told) == 1 else None
    by_round = measure_by_round(runs, measure, before=before)
    by_upload = measure_by_megabytes(runs, measure)
    figures = [
        [
            _shown(f"{measure.title} by round", "Equal rounds, data and seeds.", by_round),
            _shown(f"{measure.title} by upload", "The price of it.", by_upload),
        ]
    ]
    second = []
    if any(run.histogram for run in runs):
        second.append(
            _shown(
                "How far the parameters moved",
                f"DARE is safe while most deltas stay left of {SAFE_DELTA}, the dashed line.",
                delta_histogram(runs),
            )
        )
    if any(r.sign_conflict is not None for run in runs for r in run.rounds):
        second.append(
            _shown(
                "Sign conflict between clients",
                "Share of all parameters that two clients pushed in opposite directions.",
                sign_conflict(runs),
            )
        )
    if second:
        figures.append(second)
    return render_page(
        path,
        title=title,
        lead=lead,
        cards=_cards(runs),
        columns=table_columns(runs),
        cells=[(run.name, table_row(run, runs)) for run in runs],
        table_note=LANGUAGE_NOTE if measure is PERPLEXITY else TABLE_NOTE,
        answers=answers,
        settings=settings,
        tasks=[
            (run.name, cells) for run in runs if run.rows and (cells := task_cells(run.rows[-1]))
        ],
        task_title=TASK_TITLE,
        task_columns=TASK_COLUMNS,
        missed_title=MISSED_TITLE,
        missed_columns=MISSED_COLUMNS,
        warnings=_warnings(runs),
        missed=missed_cells([row for run in runs for row in run.rows]),
        figures=figures,
        provenance=_provenance(runs),
        footer=f"dare-agg {__version__}" + (f" · made by: {command}" if command else ""),
    )


def _warnings(runs: Sequence[RunRecord]) -> list[str]:
    """What a run warned of its noise, with the round."""
    return [
        f"{run.name}, round {row.round}: {row.noise_warning}"
        for run in runs
        for row in run.rows
        if row.noise_warning
    ]


def _by_task(run: RunRecord) -> list[tuple[str, ...]]:
    return task_cells(run.rows[-1]) if run.rows else []


def render_page(
    path: Path,
    *,
    cells: Sequence[tuple[str, Sequence[str]]],
    figures: Sequence[Sequence[dict[str, Any]]],
    **words: Any,
) -> Path:
    """Fill the template and write it; ``cells`` are the table's rows: a name and its cells."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True
    ).get_template("page.html.j2")
    text = page.render(
        table=[
            {"name": name, "colour": colour_of(index), "cells": row}
            for index, (name, row) in enumerate(cells)
        ],
        figures=[[{**figure, "svg": Markup(figure["svg"])} for figure in g] for g in figures],
        **words,
    )
    replace_file(path, (text.encode(),))
    return path


def _shown(title: str, note: str, svg: str) -> dict[str, Any]:
    return {"title": title, "note": note, "svg": svg}


def _provenance(runs: Sequence[RunRecord]) -> str:
    parts = []
    for run in runs:
        record = {"fingerprint": run.fingerprint, **run.config}
        parts.append(f"{run.name}\n{json.dumps(record, indent=2, default=str)}")
    return "\n\n".join(parts)
