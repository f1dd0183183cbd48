"""The report of one or more runs: one HTML file that needs no network and no server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dare_agg.files.atomic import replace_file
from dare_agg.runs.answers import Answers
from dare_agg.runs.report.facts import Settings, page_facts
from dare_agg.runs.report.parts import whole_page
from dare_agg.runs.report.records import RunRecord


def write_report(
    path: Path,
    runs: Sequence[RunRecord],
    *,
    title: str,
    lead: str,
    command: str = "",
    answers: Sequence[Answers] = (),
    settings: Settings | None = None,
) -> Path:
    """Write the page to ``path`` and return it; what a run has no figures of is left out.

    ``settings`` are the names of runs and (key, its value in each), where runs are compared.
    ``answers`` to test questions, where there are any, stand side by side.
    """
    facts = page_facts(
        runs, title=title, lead=lead, command=command, answers=answers, settings=settings
    )
    replace_file(path, (whole_page(facts).encode(),))
    return path
