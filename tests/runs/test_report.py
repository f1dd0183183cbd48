"""The HTML report: figures of a run, table, no network, safe text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dare_agg.cli.progress import summary_table
from dare_agg.errors import StateError
from dare_agg.offline.diagnose import diagnose_deltas
from dare_agg.runs.report import (
    RoundRecord,
    RunRecord,
    histogram_of,
    table_columns,
    table_row,
    write_diagnosis,
    write_report,
)
from dare_agg.runs.rows import RunRow, read_rows
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source


def _run(name: str, upload: float, accuracies: tuple[float, ...]) -> RunRecord:
    rounds = tuple(
        RoundRecord(number, accuracy, 1.0, upload, 100.0, 5000.0, 4, 2.0, 0.25)
        for number, accuracy in enumerate(accuracies, 1)
    )
    edges = histogram_of(np.array([1e-3, -2e-4, 0, 5e-5], np.float32))
    return RunRecord(name, rounds, 1000, 9.0, {"seed": 0}, edges, "ab" * 32)


def test_table_row_gives_accuracy_bytes_and_ratio() -> None:
    row = table_row(_run("DARE", 40.0, (0.5, 0.75)))
    assert row == ["75.0 %", "40 B", "100×", "100 B", "5.0 kB", "9"]


def test_a_run_without_encoder_upload_has_no_ratio() -> None:
    assert table_row(_run("head only", 0.0, (0.5,)))[1:3] == ["–", "–"]


def test_histogram_counts_what_moved() -> None:
    edges, counts = histogram_of(np.array([0, 1e-3, -1e-3, 1e-20, 5], np.float32))
    assert sum(counts) == 4 and len(edges) == len(counts) + 1
    assert counts[0] == 1 and counts[-1] == 1


def test_report_is_one_file_with_pictures_and_escaped_names(tmp_path: Path) -> None:
    runs = [_run("FedAvg", 4000.0, (0.5, 0.8)), _run("<b>DARE</b>", 40.0, (0.5, 0.79))]
    runs.append(_run("head only", 0.0, (0.3, 0.4)))
    path = write_report(tmp_path / "sub" / "report.html", runs, title="A & B", lead="lead")
    text = path.read_text(encoding="utf-8")
    assert text.count("<svg") == 4
    assert "&lt;b&gt;DARE&lt;/b&gt;" in text and "<b>DARE</b>" not in text
    assert "A &amp; B" in text
    assert "-1.0 points" in text and "+39.0 points" in text
    for outside in ("<script", "<link", 'src="http', "@import"):
        assert outside not in text


def test_what_was_sent_and_what_was_warned_of_stand_in_table_and_page(tmp_path: Path) -> None:
    said = "the noise is 91 % of the weights' own size in 'w<1>'"
    rows = [
        RunRow.of("dare", number, {"accuracy": 0.5}, drop_rate=rate, value_format=form, **more)
        for number, rate, form, more in (
            (1, 0.9, "b1", {"noise": 1.0, "noise_of_change": 3.8}),
            (2, 0, "b2, b4", {"noise_warning": said}),
        )
    ]
    chosen = replace(_run("DARE", 40.0, (0.5,)), rows=tuple(rows))
    older = _run("FedAvg", 4000.0, (0.5,))
    runs = [older, chosen]
    place = table_columns(runs).index("Sent, last round") - 1
    assert [table_row(run, runs)[place] for run in runs] == ["–", "p = 0, b2, b4"]
    assert len(table_columns(runs)) == len(table_row(older, runs)) + 1
    assert "Sent, last round" not in table_columns([older])
    text = write_report(tmp_path / "report.html", runs, title="t", lead="l").read_text("utf-8")
    assert "DARE, round 2: the noise is 91 %" in text and "w&lt;1&gt;" in text
    table = summary_table(rows)
    assert [c.header for c in table.columns][3] == "sent"
    assert [*table.columns[3].cells] == ["p = 0, b2, b4"]
    assert "sent" not in [c.header for c in summary_table([RunRow({"method": "a"})]).columns]


def test_same_runs_give_the_same_page(tmp_path: Path) -> None:
    runs = [_run("FedAvg", 4000.0, (0.5, 0.8))]
    pages = [write_report(tmp_path / name, runs, title="t", lead="l").read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


def test_metrics_file_that_is_being_written_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n{"round": 2', encoding="utf-8")
    assert [row.values for row in read_rows(path)] == [{"round": 1}]
    path.write_text('{"round": 1\n{"round": 2}\n', encoding="utf-8")
    with pytest.raises(StateError, match="line 1 is not JSON"):
        read_rows(path)


def test_the_page_of_a_diagnosis(tmp_path: Path) -> None:
    layout = layout_of({"embeddings.weight": (40, 5), "still.weight": (7,), "temperature": ()})
    rng = np.random.default_rng(2)
    deltas = [rng.standard_normal(layout.size).astype(np.float32) * 0.02 for _ in range(3)]
    for delta in deltas:
        delta[layout["still.weight"].offset : layout["still.weight"].stop] = 0
    names = ["<i>math</i>", "a-model-with-a-name-longer-than-the-picture-has-room-for", "c"]
    found = diagnose_deltas(layout, [array_source(d) for d in deltas], names=names)
    pages = [
        write_diagnosis(tmp_path / name, found, base="base", command="dare-agg diagnose …")
        for name in ("a.html", "b.html")
    ]
    text = pages[0].read_text(encoding="utf-8")
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert text.count("<svg") == 2 and "Deltas from base" in text
    assert "&lt;i&gt;math&lt;/i&gt;" in text and "<i>" not in text
    # The figures of the table and of the grid are those of the diagnosis.
    for model in found.models:
        assert f"<td>{model.norm:.3g}</td>" in text and f"<td>{model.largest:.2g}</td>" in text
    assert f"{found.cosine[0][1]:.2f}" in text and f"({100 * found.conflict[0][1]:.0f} %)" in text
    assert "DARE is unsafe" in text and ">embeddings</text>" in text
    for outside in ("<script", "<link", 'src="http', "@import"):
        assert outside not in text
    alone = diagnose_deltas(layout, [array_source(deltas[0])], names=["one"])
    one = write_diagnosis(tmp_path / "one.html", alone, base="base").read_text(encoding="utf-8")
    assert one.count("<svg") == 1
