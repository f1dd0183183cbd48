"""`dare-agg report`: the HTML report of a finished or running run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Output folder of a run.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; RUN/report.html by default.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the HTML report of a run."""
    from dare_agg.cli.demo import json_row
    from dare_agg.cli.output import print_json, stdout_console
    from dare_agg.errors import StateError
    from dare_agg.runs.answers import read_answers
    from dare_agg.runs.report import read_run, write_report

    runs = read_run(run, histograms=True)
    if not runs:
        raise StateError(f"{run} holds no finished round yet; wait for the first one")
    config = runs[0].config
    lead = (
        f"{config.get('model', 'a model')} on {config.get('data', 'data')}, "
        f"{runs[0].clients} clients a round, {len(runs[0].rounds)} rounds."
    )
    path = write_report(
        output or run / "report.html",
        runs,
        title=title or f"Run {run.resolve().name}",
        lead=lead,
        command=f"dare-agg report {run}",
        answers=read_answers(run),
    )
    if json:
        print_json({"runs": [json_row(one) for one in runs], "report": str(path.resolve())})
    else:
        stdout_console().print(f"Report: {path}", markup=False, highlight=False, soft_wrap=True)
