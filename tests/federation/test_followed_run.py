"""`dare-agg run --federation` of this very app over TLS: what its terminal says, how it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dare_agg.runs.log import seconds_left
from dare_agg.runs.rows import RunRow
from simulations.bench.federation import APP as EDGE
from simulations.bench.federation import finished_rounds

ROOT = Path(__file__).resolve().parents[2]
SITES = ("north", "south", "east")
EDGE_CONFIG = {"num-rounds": 6, "min-clients": 2, "pause": 4.0, "size": 50_000}
pytestmark = [pytest.mark.federation, pytest.mark.slow, pytest.mark.timeout(1800)]

_files = importlib.util.spec_from_file_location(
    "client_files", ROOT / "tests" / "client" / "conftest.py"
)
assert _files is not None and _files.loader is not None
FILES = importlib.util.module_from_spec(_files)
_files.loader.exec_module(FILES)
tiny_model, review_files = FILES.tiny_model, FILES.review_files


class Follower:
    """A `dare-agg run` that follows a run of the federation, its lines with their times."""

    def __init__(self, fed, folder: Path, *words: str) -> None:
        self.said = folder.with_suffix(".said")
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dare_agg.cli.main", "run", "--federation",
                 f"127.0.0.1:{fed.port}", "--root-certificates", str(fed.certs / "ca" / "ca.crt"),
                 *words],
                stdout=said, stderr=said, env={**os.environ, "COLUMNS": "300"},
            )  # fmt: skip

    def text(self) -> str:
        return self.said.read_text()


def rows_of(folder: Path) -> list[RunRow]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [RunRow(json.loads(line)) for line in lines]


def test_a_followed_run_says_who_is_waited_for_who_was_lost_and_how_long_it_takes(
    federation, tmp_path, tiny_model, review_files
) -> None:
    fed = federation(
        names=list(SITES), app=ROOT,
        node_config={"warm": True, "data-path": str(review_files["csv"])},
    )  # fmt: skip
    fed.start_superlink()
    for name in SITES:
        fed.register(name)
    for name in SITES[:2]:
        fed.start_node(name)
    out = tmp_path / "out"
    config = {
        "model": str(tiny_model), "data": str(review_files["csv"]), "text-column": "review",
        "label-column": "tone", "length": 12, "steps": 5, "min-clients": 3, "num-rounds": 9,
        "methods": "dare-ties", "partition": "iid", "deadline": 300.0,
        "identities": str(fed.certs / "server" / "identities.json"),
    }  # fmt: skip
    given = [word for key, value in config.items() for word in ("-c", f"{key}={value}")]
    run = Follower(fed, out, "--output", str(out), *given)
    fed.wait_for(lambda: "waiting for clients (2 of 3 online, for" in run.text(), 200)
    fed.start_node("east")
    fed.wait_for(lambda: len(rows_of(out)) >= 2, 600)
    fed.kill_9_node("east")
    fed.start_node("east")
    ended = {}  # round → when its row was there

    def over() -> bool:
        for row in rows_of(out):
            ended.setdefault(row.round, time.monotonic())
        return run.process.poll() is not None

    fed.wait_for(over, 900)
    assert run.process.returncode == 0, run.text()
    (table,) = re.findall(r"Clients that were rejected or lost.*", run.text(), re.DOTALL)
    assert re.search(r"east\s+│ [1-3] of 9\s+│ round [34]\s+│ (late|lost|away)", table), table
    # Right within a factor of two wherever nothing unforeseen comes.
    rows = rows_of(out)
    lost = max(row.round for row in rows if row.rejected or row.away)
    for number in range(max(lost, 2), len(rows)):
        left = seconds_left(rows[:number], json.loads((out / "run.json").read_text())["config"])
        assert left is not None
        right = rows[-1].seconds - rows[number - 1].seconds
        assert 0.5 <= left / right <= 2, (number, left, right)


def test_a_followed_run_that_is_interrupted_is_stopped_at_the_superlink(
    federation, tmp_path
) -> None:
    fed = federation(names=list(SITES[:2]))
    fed.start_all()
    out = tmp_path / "out"
    given = [f"{key}={value}" for key, value in EDGE_CONFIG.items()]
    given.append(f"identities={fed.certs / 'server' / 'identities.json'}")
    config = [word for pair in given for word in ("-c", pair)]
    run = Follower(fed, out, str(EDGE), "--output", str(out), *config)
    fed.wait_for(lambda: finished_rounds(out) >= 1, 300)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60) == 130  # seconds, where nothing else runs
    last = run.text().strip().splitlines()[-1]
    assert last == f"error: interrupted; go on with: dare-agg run --resume {out}"
    fed.wait_for(lambda: not fed.any_run_under_way(), 60)
    assert list(fed.runs().values()) == ["finished:stopped"]
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
