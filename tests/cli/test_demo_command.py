"""The demo: progress from a metrics file, true failures, the JSON rows; slow: the real thing."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dare_agg.cli.demo import json_row, result_table, run_command
from dare_agg.cli.demo_follow import follow, prepare_folder
from dare_agg.cli.demo_kinds import DEMOS, Demo
from dare_agg.cli.output import fitted
from dare_agg.errors import ConfigError, RunError, StateError
from dare_agg.runs.answers import read_answers
from dare_agg.runs.claim import COMMAND, claim
from dare_agg.runs.report import read_run
from tests.runs.made_run import facts_in

KEYS = [
    "method",
    "accuracy",
    "rounds",
    "clients",
    "upload_bytes_per_client_round",
    "download_bytes_per_client_round",
    "seconds",
]


def _row(method: str, number: int, accuracy: float, update: int, dense: int) -> dict:
    return {
        "method": method,
        "round": number,
        "accuracy": accuracy,
        "loss": 1.0,
        "clients": 10,
        "update_bytes_per_client": update,
        "dense_bytes_per_client": dense,
        "upload_bytes_per_client": update + dense,
        "download_bytes_per_client": 1000,
        "survivors_per_element": 10.0 if method == "fedavg" else 1.0,
        "sign_conflict": 0.4,
        "round_seconds": 1.0,
        "seconds": 2.0 * number,
    }


def _script(rows: list[dict], status: int, word: str = "") -> str:
    return (
        "import json, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        f"rows = json.loads({json.dumps(rows)!r})\n"
        "(folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\\n' for r in rows))\n"
        "(folder / 'run.json').write_text(json.dumps({'config': {'model': 'x'}}))\n"
        f"print({word!r})\n"
        f"sys.exit({status})\n"
    )


def test_follow_reads_rounds_and_gives_the_run_s_records(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    rows = [_row("fedavg", n, 0.5 + n / 10, 4000, 40) for n in (1, 2)]
    rows += [_row("dare-ties", 1, 0.6, 30, 20), _row("head-only", 1, 0.4, 40, 0)]
    follow(folder, (sys.executable, "-c", _script(rows, 0), str(folder)), 2, DEMOS["text"].methods)
    dense, ties, head = read_run(folder)
    assert list(json_row(dense)) == KEYS
    assert json_row(dense) == dict(zip(KEYS, ["fedavg", 0.7, 2, 10, 4040, 1000, 4.0], strict=True))
    assert dense.rounds[0].sign_conflict == 0.4
    assert (ties.upload, ties.head_upload, ties.rounds[0].sign_conflict) == (30, 20, None)
    # The head is this control's only payload: nothing of it counts as the encoder's update.
    assert (head.upload, head.head_upload, head.parameters) == (0, 40, 0)
    assert result_table([dense, ties, head]).row_count == 3
    console = Console(width=80, file=StringIO())
    console.print(fitted(result_table([dense, ties, head]), console))
    said = console.file.getvalue()
    assert "Accuracy" in said and "Seconds" in said and "…" not in said


def test_a_failed_run_fails_with_its_own_error(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = (sys.executable, "-c", _script([], 3, "error: no data"), str(folder))
    with pytest.raises(RunError, match=r"status 3: error: no data.*run\.log"):
        follow(folder, command, 2, DEMOS["text"].methods)


def test_an_older_run_is_replaced_and_a_stranger_s_folder_is_not(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "metrics.jsonl").write_text("")
    prepare_folder(old)
    assert list(old.iterdir()) == []
    (old / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="choose another --output"):
        prepare_folder(old)
    assert (old / "thesis.txt").exists()


def test_the_demo_leaves_a_run_alone_that_is_going_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with claim(folder, COMMAND):
        (folder / "metrics.jsonl").touch()
        with pytest.raises(ConfigError, match="a run is at work"):
            prepare_folder(folder)
        assert (folder / "metrics.jsonl").exists()


def test_run_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="output folder of a run"):
        read_run(tmp_path)


@pytest.mark.parametrize("kind", DEMOS.values(), ids=DEMOS)
def test_every_setting_of_a_demo_is_a_valid_run_config(tmp_path: Path, kind: Demo) -> None:
    from dare_agg.cli.demo import demo_settings
    from dare_agg.cli.run_config import parse_overrides
    from server.reading import read_config

    words = run_command(tmp_path, demo_settings(kind, 0, 1), 10)
    pairs = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
    assert read_config(parse_overrides(pairs)).methods == kind.methods


def test_report_command_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dare_agg.cli.main", "report", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_of_language_models(tmp_path: Path) -> None:
    """One round through Flower on the real model: perplexity falls, answers stand side by side."""
    done = subprocess.run(
        [sys.executable, "-m", "dare_agg.cli.main", "demo", "--task", "language", "--rounds", "1",
         "--clients", "2", "-o", str(tmp_path / "demo"), "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    printed = json.loads(done.stdout)
    dense, compact = printed["runs"]
    assert dense["upload_bytes_per_client_round"] > 200 * compact["upload_bytes_per_client_round"]
    (answers,) = read_answers(tmp_path / "demo" / "run")
    (name, before, _), *after = answers.models
    assert name == "before" and len(after) == 2 and len(answers.lines) == 8
    for run, (_, perplexity, _) in zip(printed["runs"], after, strict=True):
        assert perplexity == pytest.approx(run["perplexity"], rel=0.02)
        assert before is not None and run["perplexity"] < before / 4
    facts = facts_in(Path(printed["report"]).read_text(encoding="utf-8"))
    (shown,) = facts["answers"]
    assert shown["title"] == "Answers side by side: arithmetic-worked"
    assert len(shown["right"]) == 8
    assert all(one["points"] for one in facts["series"]) and len(facts["series"]) == 2


def test_an_unknown_demo_is_refused_with_the_nearest() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dare_agg.cli.main", "demo", "--task", "langage"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "did you mean 'language'" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_itself(tmp_path: Path) -> None:
    """One round of the real demo through Flower, on the real model and data."""
    done = subprocess.run(
        [sys.executable, "-m", "dare_agg.cli.main", "demo", "--rounds", "1", "--clients", "3",
         "-o", str(tmp_path / "demo"), "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    printed = json.loads(done.stdout)
    assert [list(run) for run in printed["runs"]] == [KEYS] * 4
    by_name = {run["method"]: run for run in printed["runs"]}
    upload = {name: run["upload_bytes_per_client_round"] for name, run in by_name.items()}
    assert upload["fedavg"] > 90_000_000
    assert upload["fedavg"] / upload["dare-task-arithmetic"] > 300
    facts = facts_in(Path(printed["report"]).read_text(encoding="utf-8"))
    assert [one["method"] for one in facts["series"]] == list(by_name)
    assert all(one["points"] for one in facts["series"])
