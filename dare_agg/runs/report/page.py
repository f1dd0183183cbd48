"""The HTML page of one or more runs: a table and pictures in one file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dare_agg import __version__
from dare_agg.files.atomic import replace_file
from dare_agg.runs.missed import MISSED_COLUMNS, MISSED_TITLE, missed_cells
from dare_agg.runs.report.pictures import (
    accuracy_by_megabytes,
    accuracy_by_round,
    colour_of,
    delta_histogram,
    sign_conflict,
)
from dare_agg.runs.report.records import RunRecord
from dare_agg.runs.words import human_bytes
from dare_agg.vectors.sources import SAFE_DELTA

COLUMNS = (
    "Method",
    "Accuracy",
    "Upload / client / round",
    "Smaller by",
    "Dense head, extra",
    "Download / client / round",
    "Seconds",
)


def table_row(run: RunRecord) -> list[str]:
    """The cells of a run under `COLUMNS`, without its name."""
    ratio = 4 * run.parameters / run.upload if run.upload else None
    return [
        "–" if run.accuracy is None else f"{100 * run.accuracy:.1f} %",
        human_bytes(run.upload) if run.upload else "–",
        "–" if ratio is None else f"{ratio:,.0f}×" if ratio > 1.05 else "1×",
        human_bytes(run.head_upload) if run.head_upload else "–",
        human_bytes(run.download),
        f"{run.seconds:.0f}",
    ]


TABLE_NOTE = (
    "Upload is the encoded update of the fine-tuned encoder, as it travels. The small dense head "
    "is averaged with every value and counted in its own column. “Smaller by” compares with the "
    "encoder's parameters in float32. “Head only” never changes the encoder: what lies above that "
    "row is what the compact updates achieved."
)


def _cards(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    dense = next((r for r in runs if r.name.lower().startswith("fedavg")), None)
    control = next((r for r in runs if "head" in r.name.lower()), None)
    compact = [r for r in runs if r is not dense and r is not control and r.accuracy is not None]
    if not compact:
        return []
    best = max(compact, key=lambda r: r.accuracy or 0)
    cards = [{"figure": f"{100 * (best.accuracy or 0):.1f} %", "text": f"accuracy, {best.name}"}]
    if best.upload:
        cards.append(
            {
                "figure": f"{4 * best.parameters / best.upload:,.0f}×",
                "text": f"smaller upload: {human_bytes(best.upload)} instead of "
                f"{human_bytes(4 * best.parameters)}",
            }
        )
    if dense and dense.accuracy is not None:
        gap = 100 * ((best.accuracy or 0) - dense.accuracy)
        cards.append({"figure": f"{gap:+.1f} points", "text": "against dense FedAvg"})
    if control and control.accuracy is not None:
        gap = 100 * ((best.accuracy or 0) - control.accuracy)
        cards.append({"figure": f"{gap:+.1f} points", "text": "against training the head alone"})
    return cards


def write_report(
    path: Path, runs: Sequence[RunRecord], *, title: str, lead: str, command: str = ""
) -> Path:
    """Write the page to ``path`` and return it; figures without data are left out."""
    figures = [
        [
            _shown("Accuracy by round", "Equal rounds, data and seeds.", accuracy_by_round(runs)),
            _shown("Accuracy by upload", "The price of it.", accuracy_by_megabytes(runs)),
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
        columns=COLUMNS,
        cells=[(run.name, table_row(run)) for run in runs],
        table_note=TABLE_NOTE,
        missed_title=MISSED_TITLE,
        missed_columns=MISSED_COLUMNS,
        missed=missed_cells([row for run in runs for row in run.rows]),
        figures=figures,
        provenance=_provenance(runs),
        footer=f"dare-agg {__version__}" + (f" · made by: {command}" if command else ""),
    )


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
