"""Runs side by side: what differs, under which names, on one page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dare_agg.errors import ConfigError, StateError
from dare_agg.runs.comparison import compare_runs, differing, run_names
from tests.runs.made_run import facts_in
from tests.tiny import command


def make_run(folder: Path, accuracy: float, methods: tuple[str, ...] = ("dare-ties",), **words):
    folder.mkdir(parents=True)
    config = {"seed": 0, "drop-rate": "0.9", "methods": list(methods), "output": str(folder)}
    state = {"status": "finished", "config": {**config, **words}}
    (folder / "run.json").write_text(json.dumps(state))
    rows = [
        {
            "method": method, "round": number, "accuracy": accuracy - 0.1 * (2 - number),
            "clients": 3, "accepted": 3, "parameters": 1000, "update_bytes_per_client": 40,
            "upload_bytes_per_client": 50, "download_bytes_per_client": 4000,
            "upload_bytes": 150, "download_bytes": 12000, "seconds": 2.0 * number,
        }
        for method in methods
        for number in (1, 2)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path):
    first = make_run(tmp_path / "a" / "run", 0.8, ("fedavg", "dare-ties"))
    second = make_run(tmp_path / "b" / "run", 0.7, **{"drop-rate": "0.99", "alpha": 0.1})
    return [first, second]


def test_settings_that_differ_and_names_that_tell_apart(runs):
    found = compare_runs(runs)
    assert found.names == ("a/run", "b/run")
    assert dict(found.settings) == {
        "drop-rate": ("0.9", "0.99"),
        "methods": ("fedavg,dare-ties", "dare-ties"),
        "alpha": ("–", "0.1"),
    }
    assert [run.name for run in found.runs] == [
        "a/run: FedAvg", "a/run: DARE TIES", "b/run: DARE TIES",
    ]  # fmt: skip


def test_a_page_and_tables(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    page = tmp_path / "page.html"
    status, said = command(capsys, "compare", *runs, "-o", page)
    assert not status and "Settings that differ" in said and "0.99" in said
    assert "b/run: DARE TIES" in said and "24.3 kB" in said
    text = page.read_text(encoding="utf-8")
    facts = facts_in(text)
    assert [one["name"] for one in facts["series"]] == [run.name for run in compare_runs(runs).runs]
    assert [row[0] for row in facts["settings"]["rows"]] == ["drop-rate", "methods", "alpha"]
    # Nothing is fetched: addresses stand in names of XML alone.
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?https?:""", text)


def test_json(runs, tmp_path, capsys):
    status, said = command(capsys, "compare", *runs, "-o", tmp_path / "page.html", "--json")
    found = json.loads(said)
    assert not status and found["settings"]["drop-rate"] == ["0.9", "0.99"]
    assert [row["accuracy"] for row in found["results"]] == [0.8, 0.8, 0.7]


def test_runs_of_the_same_settings_say_so(tmp_path, capsys):
    folders = [make_run(tmp_path / name, 0.5) for name in ("one", "two")]
    status, said = command(capsys, "compare", *folders, "-o", tmp_path / "page.html")
    assert not status and "the same settings" in said


def test_what_cannot_be_compared(runs, tmp_path):
    with pytest.raises(ConfigError, match="1 run to compare"):
        compare_runs(runs[:1])
    with pytest.raises(ConfigError, match="given twice"):
        compare_runs([runs[0], runs[0]])
    with pytest.raises(StateError, match="holds no metrics"):
        compare_runs([runs[0], tmp_path])
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="no finished round"):
        compare_runs([runs[0], tmp_path / "new"])


def test_lists_truth_values_and_nothing_read_as_typed():
    rows = differing([{"a": True, "b": [1, 2], "c": ""}, {"a": False, "b": [1], "c": "x"}])
    assert rows == [("a", ("true", "false")), ("b", ("1,2", "1")), ("c", ('""', "x"))]
    assert run_names([Path("/x/one"), Path("/x/two")]) == ["one", "two"]
