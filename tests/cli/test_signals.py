"""Ctrl-C, SIGTERM and a closed terminal, on processes that a command started."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from dare_agg.flower.processes.ending import command_of, end_family, family, sessions_of

# A command that starts what leads a session of its own, once deaf to SIGTERM, and waits.
COMMAND = '''
import os, subprocess, sys, time
from pathlib import Path
from dare_agg.cli import signals
from dare_agg.cli.ending import ended_whole
from dare_agg.cli import main as entry

folder, deaf = Path(sys.argv[1]), sys.argv[2]
# Deaf, without an environment, and soon without a parent: as what is just being started.
BARE = """env -i sh -c "trap '' TERM; sleep 600; true" """
def command(**_):
    with ended_whole(folder, folder / "flower", {"num-rounds": 2}):
        subprocess.Popen(
            ["sh", "-c", deaf + "(setsid sleep 600; true) & " + BARE + " & sleep 600; true"],
            env={**os.environ, "FLWR_HOME": str(folder / "flower")}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        (folder / "ready").touch()
        time.sleep(600)
entry.app = command
entry.main([])
'''
DEAF = "trap '' TERM; "


def members(folder: Path) -> set[int]:
    """Ids of the processes that the command started."""
    return family(folder / "flower")


def alive(pids: set[int]) -> list[str]:
    """Command lines of those processes that are there, zombies aside."""
    return [line for pid in pids if (line := command_of(pid))]


def start(folder: Path, deaf: str = "", **more: object) -> subprocess.Popen:
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(folder), deaf],
        # These tests may themselves run under nohup.
        **{
            "preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            **more,
        },  # type: ignore
    )
    end = time.monotonic() + 60
    while not (folder / "ready").exists() or len(members(folder)) < 5:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    return process


@pytest.fixture
def folder(tmp_path: Path):
    yield tmp_path / "run"
    end_family(tmp_path / "run" / "flower", kindly=0)


@pytest.mark.parametrize("deaf", ["", DEAF])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_ends_all_and_says_so(folder: Path, number: int, deaf: str) -> None:
    process = start(folder, deaf)
    there = members(folder)
    process.send_signal(number)
    said, _ = process.communicate(timeout=15)
    assert process.returncode == 128 + number
    assert alive(there) == []
    word = f"error: interrupted; go on with: dare-agg run --resume {folder}\n"
    assert said.decode() == word
    state = json.loads((folder / "run.json").read_text())
    assert state == {
        "config": {"num-rounds": 2}, "status": "interrupted", "error": "interrupted",
    }  # fmt: skip


def test_a_second_signal_ends_at_once(folder: Path) -> None:
    process = start(folder, DEAF)
    there = members(folder)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    assert time.monotonic() - began < 2 and alive(there) == []
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"


def lead_the_terminal(terminal: int) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def test_a_terminal_that_is_closed_ends_it(folder: Path) -> None:
    # The child leads the session of the terminal, as a shell's job does in effect.
    here, there = pty.openpty()
    process = start(
        folder, stdin=there, stdout=there, stderr=there,
        preexec_fn=lambda: lead_the_terminal(there),
    )  # fmt: skip
    os.close(there)
    started = members(folder)
    os.close(here)
    assert process.wait(15) == 128 + signal.SIGHUP
    assert alive(started) == []
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"


def test_nohup_is_respected(folder: Path) -> None:
    process = start(folder, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None and len(members(folder)) >= 5
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 143


def test_what_run_json_says_is_not_written_over(tmp_path: Path) -> None:
    from dare_agg.runs.ending import note_end

    path = tmp_path / "run.json"
    for before, status, after in (
        ("completed", "interrupted", "completed"),
        ("failed", "interrupted", "interrupted"),
        ("running", "interrupted", "interrupted"),
        ("running", "failed", "failed"),
        ("interrupted", "failed", "interrupted"),
        ("failed", "failed", "failed"),
    ):
        path.write_text(json.dumps({"status": before, "config": {"a": 1}}))
        note_end(tmp_path, status, "why", {})
        assert json.loads(path.read_text())["status"] == after
        assert json.loads(path.read_text())["config"] == {"a": 1}
    path.unlink()
    note_end(tmp_path, "failed", "why", {"a": 1})
    assert not path.exists()


def test_a_session_that_is_over_is_forgotten(folder: Path) -> None:
    process = start(folder)
    home = folder / "flower"
    until = time.monotonic() + 15
    while len(sessions_of(home)) < 2 and time.monotonic() < until:
        time.sleep(0.05)  # a child opens its session after it is there
    assert family(home) and len(sessions_of(home)) >= 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 143
    assert family(home) == set() and sessions_of(home) == set()
