"""The HTML page of a diagnosis: how far each layer moved, and how the models agree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dare_agg import __version__
from dare_agg.files.atomic import replace_file
from dare_agg.offline.diagnose import QUANTILES, Diagnosis
from dare_agg.runs.report.pictures import agreement_grid, colour_of, quantiles_by_layer
from dare_agg.vectors.sources import SAFE_DELTA

COLUMNS = ("Model", *(f"q{q:g}" for q in QUANTILES), "Largest", f"> {SAFE_DELTA}", "Zeros", "Norm")
NOTE = (
    "Quantiles of |delta| = |tuned − base|. DARE is safe while almost all of them stay below "
    f"{SAFE_DELTA}; where 0.01 is common, even a drop rate of 0.1 is known to destroy a model."
)


def write_diagnosis(path: Path, found: Diagnosis, *, base: str, command: str = "") -> Path:
    """Write the page of a diagnosis against ``base`` (its name) to ``path`` and return it."""
    shown = [t for t in found.tensors if t.size]
    figures = [
        {
            "title": "How far each layer moved",
            "note": "|delta| by tensor in the model's order, the worst model. "
            f"Dashed: {SAFE_DELTA}.",
            "svg": quantiles_by_layer(
                [(t.name, t.quantiles) for t in shown], QUANTILES, SAFE_DELTA
            ),
        }
    ]
    names = [model.name for model in found.models]
    if len(names) > 1:
        figures.append(
            {
                "title": "How the models agree",
                "note": "Cosine of two deltas; in brackets the share of opposite signs.",
                "svg": agreement_grid(names, found.cosine, found.conflict),
            }
        )
    warnings = "".join(f" Warning: {warning}." for warning in found.warnings)
    return render_page(
        path,
        title=f"Deltas from {base}",
        lead=f"{len(names)} models, {found.parameters:,} parameters. {found.why}.{warnings}",
        cards=[{"figure": f"{found.safe_drop_rate:g}", "text": "drop rate that looks safe"}],
        columns=COLUMNS,
        cells=[
            (
                model.name,
                [
                    *(f"{q:.2g}" for q in model.quantiles), f"{model.largest:.2g}",
                    f"{model.above_small:.2%}", f"{model.zeros:.1%}", f"{model.norm:.3g}",
                ],
            )
            for model in found.models
        ],
        table_note=NOTE,
        figures=[figures],
        provenance=json.dumps(found.as_dict(), indent=2),
        footer=f"dare-agg {__version__}" + (f" · made by: {command}" if command else ""),
    )  # fmt: skip


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
    ).get_template("diagnosis.html.j2")
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
