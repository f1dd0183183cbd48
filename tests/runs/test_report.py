"""The HTML report: figures of a run, table, no network, safe text."""

from __future__ import annotations

import base64
import hashlib
import html
import re
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
from dare_agg.runs.report.series import coinciding, target_of, totals
from dare_agg.runs.rows import RunRow, read_rows
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source
from tests.runs.made_run import a_row, facts_in


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
    facts = facts_in(text)
    assert [one["name"] for one in facts["series"]] == ["FedAvg", "<b>DARE</b>", "head only"]
    assert all(facts["histograms"]) and facts["series"][0]["points"][1]["conflict"] == 0.25
    assert "&lt;b&gt;DARE&lt;/b&gt;" in text and "<b>DARE</b>" not in text
    assert "A &amp; B" in text
    assert "-1.0 points" in text and "+39.0 points" in text
    for outside in ('<link rel="stylesheet', "src=", "@import", "url("):
        assert outside not in text
    # The policy admits the file's own style and script by their hashes, nothing else.
    policy = html.unescape(re.search(r'Policy" content="([^"]*)"', text)[1])
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for element in ("style", "script"):
        body = re.search(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)[1]
        found = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{found}'" in policy


def test_totals_count_every_client_and_round_in_both_directions() -> None:
    told = RunRow.of("dare", 1, {"accuracy": 0.5}, upload_bytes=7, download_bytes=9)
    run = replace(_run("dare", 40.0, (0.5,)), rows=(told,))
    assert totals(run) == (7, 9)
    # Where rows do not say it: what a client moved, by the clients.
    assert totals(_run("dare", 40.0, (0.5, 0.6))) == (2 * 4 * 140, 2 * 4 * 5000)


def test_a_target_and_curves_that_lie_on_each_other() -> None:
    runs = [_run(name, 40.0, (0.5, end)) for name, end in (("a", 0.8), ("b", 0.8), ("c", 0.7))]
    assert target_of(runs) == 76.0 and target_of([]) is None
    assert coinciding(runs) == ["a and b lie on each other: in all 2 rounds they are the same."]
    assert coinciding([runs[0], runs[2]]) == [] == coinciding([])
    rounds = [replace(one, perplexity=20.0 / one.number) for one in runs[0].rounds]
    language = replace(runs[0], rounds=tuple(rounds))
    assert target_of([language]) == 10.5
    # On a logarithmic axis, and in the range that the model before the first round widens.
    other = [replace(one, perplexity=20.3 / one.number) for one in runs[0].rounds]
    pair = [language, replace(language, method="d", rounds=tuple(other))]
    assert coinciding(pair) == []
    assert coinciding(pair, 2000.0) == [
        "a and d lie on each other: in all 2 rounds they differ by 0.3 at most."
    ]


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
    assert facts_in(text)["warnings"] == [f"DARE, round 2: {said}"] and "w<1>" not in text
    table = summary_table(rows)
    assert [c.header for c in table.columns][3] == "sent"
    assert [*table.columns[3].cells] == ["p = 0, b2, b4"]
    assert "sent" not in [c.header for c in summary_table([RunRow({"method": "a"})]).columns]


def test_the_ratio_of_a_run_without_fedavg_is_the_reports() -> None:
    for more, said in (
        ({}, "10×"),
        ({"update_bytes_per_client": 2500}, "1.6×"),
        ({"parameters": None}, "–"),
    ):
        table = summary_table([RunRow(a_row("dare", 1, 0.5, **more))])
        assert {c.header: [*c.cells] for c in table.columns}["ratio"] == [said]


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
