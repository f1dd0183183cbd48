"""How real runs end: workers killed, Ray killed, the command interrupted, the terminal closed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dare_agg.cli.progress import load_config

APP = Path(__file__).parents[1] / "apps" / "edge"
MARK = "DARE_AGG_TEST_RUN"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Started:
    """A `dare-agg run` of the edge app: 3 clients that train for ``pause`` seconds a round."""

    def __init__(self, folder: Path, *words: str, rounds: int = 4, pause: float = 2.0) -> None:
        self.folder = folder
        self.said = folder.with_suffix(".said")
        words = words or ("--output", str(folder), "--clients", "3")
        config = ["-c", f"num-rounds={rounds}", "-c", f"pause={pause}"]
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dare_agg.cli.main", "run", str(APP), *words, *config],
                env={**os.environ, MARK: str(folder)}, stdout=said, stderr=said, cwd=folder.parent,
                start_new_session=True,
                # These tests may themselves run under nohup.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            )  # fmt: skip

    def family(self) -> dict[int, str]:
        """All processes of the run, the command included, by their mark: id → command line."""
        mark, found = f"{MARK}={self.folder}\0".encode(), {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes() + b"\0":
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = command.decode(errors="replace")
        return found

    def kill_9(self, name: str) -> None:
        """kill -9 of the first process whose command line has ``name``."""
        os.kill(next(pid for pid, line in self.family().items() if name in line), signal.SIGKILL)

    def until(self, condition: Callable[[], bool], seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < end, self.said.read_text()
            time.sleep(0.1)

    def until_round(self, number: int) -> None:
        """Wait for the middle of a round, clients at work."""
        log = self.folder / "run.log"
        self.until(lambda: log.is_file() and f"[ROUND {number}/" in log.read_text())
        self.until(lambda: "train: 3 of" in log.read_text().rpartition(f"[ROUND {number}/")[2])
        time.sleep(0.7)

    def ends(self, seconds: float) -> tuple[int, str]:
        """Exit status and last line, within so many seconds and with nothing left."""
        status = self.process.wait(seconds)
        time.sleep(0.2)
        assert self.family() == {}
        return status, self.said.read_text().strip().splitlines()[-1]

    def state(self) -> dict:
        return json.loads((self.folder / "run.json").read_text())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    pytest.importorskip("ray")
    started: list[Started] = []

    def go(*words: str, **more: float) -> Started:
        started.append(Started(tmp_path / "run", *words, **more))  # type: ignore[arg-type]
        return started[-1]

    yield go
    for one in started:
        for pid in one.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        one.process.wait()


def test_a_worker_that_is_killed_is_replaced_and_costs_one_update(start) -> None:
    run = start()
    run.until_round(2)
    run.kill_9("ray::ClientAppActor")
    assert run.ends(300)[0] == 0, run.said.read_text()
    rounds = json.loads((run.folder / "report.json").read_text())["rounds"]
    assert [one["accepted"] for one in rounds] == [3, 2, 3, 3]
    assert [one["rejected"] for one in rounds] == [[], ["worker"], [], []]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("raylet/raylet", "Ray's raylet, without which no client can run, ended"),
        ("gcs_server", "Ray's gcs_server, without which no client can run, ended"),
        ("flwr-simulation", "the simulation's process died"),
        ("flower-superlink", "the SuperLink ended with status -9"),
    ],
)
def test_without_what_a_run_stands_on_it_ends_with_that_word(start, name: str, word: str) -> None:
    run = start()
    run.until_round(2)
    run.kill_9(name)
    status, line = run.ends(60)
    assert status == 1 and line.startswith("error: ") and word in line, line
    assert run.state()["status"] == "failed" and word in run.state()["error"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_nothing_and_can_be_resumed(start, number: int) -> None:
    run = start(rounds=3)
    run.until_round(2)
    run.process.send_signal(number)
    status, line = run.ends(20)
    assert status == 128 + number
    assert line == f"error: interrupted; go on with: dare-agg run --resume {run.folder}"
    assert run.state()["status"] == "interrupted"
    assert load_config(run.folder)["num-rounds"] == 3
    if number != signal.SIGINT:
        return
    again = start("--resume", str(run.folder), "--clients", "3", rounds=3, pause=0.0)
    assert again.ends(300)[0] == 0, again.said.read_text()
    report = json.loads((run.folder / "report.json").read_text())
    assert report["resumed_after"] == 1 and len(report["rounds"]) == 2


@pytest.mark.parametrize("name", ["flower-superlink", "flwr run", "flwr-simulation", "raylet"])
def test_a_run_is_interrupted_while_it_starts(start, name: str) -> None:
    run = start()
    run.until(lambda: any(name in line for line in run.family().values()))
    run.process.send_signal(signal.SIGINT)
    assert run.ends(20)[0] == 130
    assert run.state()["status"] == "interrupted" and load_config(run.folder)["num-rounds"] == 4


def test_a_second_signal_ends_at_once(start) -> None:
    run = start()
    run.until_round(1)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    run.process.send_signal(signal.SIGINT)
    run.process.wait(2)
    time.sleep(0.5)
    assert run.family() == {} and run.state()["status"] == "interrupted"
