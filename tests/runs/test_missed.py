"""Rejected, lost and absent clients: the table at a run's end, and that of the report."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from dare_agg.cli.progress import missed_table
from dare_agg.runs.missed import missed_cells
from dare_agg.runs.report import read_run, write_report
from dare_agg.runs.rows import RunRow
from tests.runs.made_run import facts_in

LATE = {"client": 1, "name": "south", "reason": "late", "detail": "no answer in time"}
LOST = {"client": 0, "name": "north", "reason": "lost", "detail": "Flower error code 5"}
STRANGER = {"client": 77, "name": "", "reason": "unknown-node", "detail": "<b>no plan</b> [red]"}
REFUSED = {"name": "node 9", "detail": "signature: client 'x' is not among the 2 known"}


def row(number: int, method: str = "dare-ties", **more: object) -> RunRow:
    return RunRow({"method": method, "round": number, "accepted": 2, "seconds": 1.0, **more})


ROWS = [
    row(1, rejected=[LATE], refused=[REFUSED]),
    row(2, rejected=[LOST, {**LATE, "reason": "signature"}], refused=[REFUSED]),
    row(3, away=["north"], refused=[REFUSED], evaluate_failed=[LATE, LATE]),
    row(4, away=["north"], rejected=[STRANGER], refused=[REFUSED]),
]
CELLS = [
    ("node 9", "4 of 4", "round 1", "turned away: signature: client 'x' is not among the 2 known"),
    ("south", "3 of 4", "round 1", "late: no answer in time"),
    ("north", "3 of 4", "round 2", "lost: Flower error code 5"),
    ("client 77", "1 of 4", "round 4", "unknown-node: <b>no plan</b> [red]"),
]


def test_who_how_often_and_why_first() -> None:
    assert missed_cells(ROWS) == CELLS
    assert missed_cells([row(1), row(2)]) == []
    evaluation = missed_cells([row(1, evaluate_failed=[LOST])])
    assert evaluation == [("north", "1 of 1", "round 1", "evaluation: lost: Flower error code 5")]
    two = [*ROWS, row(1, "fedavg", rejected=[LATE])]
    assert ("south", "4 of 5", "dare-ties, round 1", "late: no answer in time") in missed_cells(two)
    # What a folder of another version, or a stranger, has in its rows breaks nothing.
    assert missed_cells([row(1, rejected=[{}, {"reason": 3}], away=[1], refused="x")]) != []


def test_the_table_in_the_terminal_says_it_as_it_is() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table = missed_table(ROWS)
    assert table is not None
    console.print(table)
    shown = console.export_text()
    for cells in CELLS:
        for cell in cells:
            assert cell in shown
    assert missed_table([row(1)]) is None


def test_the_report_has_the_table(tmp_path: Path) -> None:
    for rows, there in ((ROWS, True), ([row(1), row(2)], False)):
        text = "".join(json.dumps(one.values) + "\n" for one in rows)
        (tmp_path / "metrics.jsonl").write_text(text)
        page = write_report(tmp_path / "r.html", read_run(tmp_path), title="t", lead="l")
        said = page.read_text(encoding="utf-8")
        assert bool(facts_in(said)["missed"]["rows"]) == there
        assert ("turned away: signature" in said) == there
        assert "<b>no plan" not in said
