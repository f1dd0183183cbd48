"""`dare-agg compare`: several runs side by side, in the terminal and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from dare_agg.runs.comparison import Comparison

PAGE = "comparison.html"


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of two runs or more.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file.")] = Path(PAGE),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare runs: settings that differ, results and bytes, curves over rounds and bytes."""
    from dare_agg.cli.demo import json_row
    from dare_agg.cli.output import fitted, print_json, stdout_console
    from dare_agg.runs.comparison import compare_runs
    from dare_agg.runs.report import write_report

    found = compare_runs(runs)
    page = write_report(
        output,
        found.runs,
        title=title or "Runs side by side",
        lead=f"{len(found.names)} runs: {', '.join(found.names)}.",
        command=f"dare-agg compare {' '.join(map(str, runs))}",
        settings=(found.names, found.settings),
    )
    if json_:
        print_json(
            {
                "runs": list(found.names),
                "settings": {key: list(values) for key, values in found.settings},
                "results": [json_row(run) for run in found.runs],
                "report": str(page.resolve()),
            }
        )
        return
    console = stdout_console()
    console.print(settings_table(found))
    console.print(fitted(results_table(found), console))
    console.print(f"Curves over rounds and bytes: {page}")


def settings_table(found: Comparison) -> Table | str:
    """The settings that differ, a column a run."""
    from rich.table import Table
    from rich.text import Text

    if not found.settings:
        return "The runs have the same settings."
    table = Table(title="Settings that differ")
    table.add_column("key")
    for name in found.names:
        table.add_column(Text(name), overflow="fold")
    for key, values in found.settings:
        table.add_row(key, *map(Text, values))
    return table


def results_table(found: Comparison) -> Table:
    """A row a run and method: what was measured last, bytes of both directions, seconds."""
    from rich.table import Table
    from rich.text import Text

    from dare_agg.runs.report import table_columns, table_row
    from dare_agg.runs.words import human_bytes

    table = Table(title="After the last round")
    for index, column in enumerate((*table_columns(found.runs), "Both ways, in all")):
        table.add_column(column, justify="right" if index else "left")
    for run in found.runs:
        moved = sum(row.upload_bytes + row.download_bytes for row in run.rows)
        cells = table_row(run, found.runs)
        table.add_row(Text(run.name), *cells, human_bytes(moved) if moved else "–")
    return table
