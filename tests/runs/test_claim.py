"""A run folder is one run's at a time, and a refused claim leaves it as it was."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dare_agg.errors import StateError
from dare_agg.runs.claim import (
    COMMAND,
    SERVER,
    check_folder,
    claim,
    is_claimed,
    read_simulation,
    write_simulation,
)

# Waits for the word to start, claims, says so, and holds the folder until its input ends.
CLAIMANT = """
import sys
from pathlib import Path
from dare_agg.errors import StateError
from dare_agg.runs.claim import claim
sys.stdin.readline()
try:
    with claim(Path(sys.argv[1]), sys.argv[2]):
        print("won", flush=True)
        sys.stdin.readline()
except StateError as error:
    print(error, flush=True)
"""


def claimant(folder: Path, lock: str = COMMAND) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLAIMANT, str(folder), lock],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def say(process: subprocess.Popen[str]) -> str:
    """Send the next word; returns the process's answer."""
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def prints(folder: Path) -> dict[str, str]:
    """Every file below a folder and what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_run(folder: Path, rounds: int, status: str) -> Path:
    folder.mkdir()
    rows = [{"method": "fedavg", "round": number + 1} for number in range(rounds)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"num-rounds": 3, "min-clients": 4}
    (folder / "run.json").write_text(json.dumps({"status": status, "config": config}))
    return folder


def test_of_many_processes_one_wins_and_the_others_change_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    processes = [claimant(folder) for _ in range(8)]
    for process in processes:  # all are started before one is let go
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.stdout.readline().strip() for process in processes]
    assert answers.count("won") == 1
    winner = processes[answers.index("won")]
    lost = [answer for answer in answers if answer != "won"]
    said = f"another run is at work in {folder} (process {winner.pid})"
    assert all(answer.startswith(said) for answer in lost), lost
    assert [path.name for path in folder.iterdir()] == [COMMAND]
    for process in processes:
        process.communicate()
    with claim(folder, COMMAND):
        pass


def test_a_killed_process_leaves_the_folder_free(tmp_path: Path) -> None:
    process = claimant(tmp_path / "run")
    assert say(process) == "won\n"
    assert is_claimed(tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not is_claimed(tmp_path / "run")
    with claim(tmp_path / "run", COMMAND):
        pass


def test_a_server_that_outlived_its_command_keeps_the_folder(tmp_path: Path) -> None:
    process = claimant(tmp_path / "run", SERVER)
    assert say(process) == "won\n"
    with (
        pytest.raises(StateError, match="another run is at work"),
        claim(tmp_path / "run", COMMAND),
    ):
        pass
    process.communicate()


def test_a_command_and_its_own_server_share_it(tmp_path: Path) -> None:
    with claim(tmp_path / "run", COMMAND):
        (tmp_path / "run" / "run.log").touch()
        (tmp_path / "run" / "flower").mkdir()
        with claim(tmp_path / "run", SERVER):
            pass


@pytest.mark.parametrize(
    ("rounds", "status", "why"),
    [
        (3, "completed", r"holds a finished run \(fedavg: 3 of 3 rounds\); name another folder"),
        (2, "failed", r"not finished \(fedavg: 2 of 3 rounds\); go on.*dare-agg run --resume"),
        (1, "running", r"not finished \(fedavg: 1 of 3 rounds\)"),
    ],
)
def test_no_run_begins_where_one_stands(tmp_path: Path, rounds: int, status: str, why: str) -> None:
    folder = make_run(tmp_path / "run", rounds, status)
    before = prints(folder)
    for lock in (COMMAND, SERVER):
        with pytest.raises(StateError, match=why), claim(folder, lock):
            pass
    assert prints(folder) == before


def test_a_run_that_finished_no_round_gives_way_to_another(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 0, "failed")
    (folder / "run.log").write_text("ERROR\n")
    (folder / "flower").mkdir()
    with claim(folder, COMMAND):
        pass


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / name).write_text(name)
    before = prints(tmp_path)
    with (
        pytest.raises(StateError, match="what is no run's: a, b, c and 2 more; name a new"),
        claim(tmp_path, COMMAND),
    ):
        pass
    assert prints(tmp_path) == before


def test_a_file_and_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for path, why in ((file, "is a file"), (file / "run", "cannot be written: Not a directory")):
        with pytest.raises(StateError, match=f"{why}.*name another folder"), claim(path, COMMAND):
            pass
    long = tmp_path / "made" / ("x" * 300)
    with (
        pytest.raises(StateError, match="cannot be written: File name too long"),
        claim(long, COMMAND),
    ):
        pass
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    with (
        pytest.raises(StateError, match="cannot be written: Permission denied"),
        claim(tmp_path / "run", COMMAND),
    ):
        pass


def test_what_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="holds no run to resume"):
        check_folder(tmp_path, resume=True, rounds=3)
    finished = make_run(tmp_path / "finished", 3, "completed")
    with pytest.raises(StateError, match=r"finished run.*nothing is left.*-c num-rounds=4"):
        check_folder(finished, resume=True, rounds=3)
    with pytest.raises(StateError, match="has 3 rounds already, num-rounds = 2; give at least 3"):
        check_folder(finished, resume=True, rounds=2)
    check_folder(finished, resume=True, rounds=4)
    check_folder(make_run(tmp_path / "failed", 2, "failed"), resume=True, rounds=3)
    # Killed between its last round and its end: the model is still to be written.
    check_folder(make_run(tmp_path / "killed", 3, "running"), resume=True, rounds=3)


def test_a_simulation_notes_its_clients(tmp_path: Path) -> None:
    assert read_simulation(tmp_path) is None
    folder = make_run(tmp_path / "old", 1, "failed")
    assert read_simulation(folder) == 4  # as earlier versions left it
    write_simulation(folder, 7)
    assert read_simulation(folder) == 7
