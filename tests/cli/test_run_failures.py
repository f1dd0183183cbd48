"""How real runs fail: one line with the cause and the log, no traceback, no colours."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from dare_agg.cli.ending import failure
from dare_agg.cli.output import stderr_console
from dare_agg.cli.progress import follow
from dare_agg.errors import DareError, plain_line

APP = """
[project]
name = "failing"
version = "1.0.0"
[tool.flwr.app]
publisher = "dare-agg"
[tool.flwr.app.components]
serverapp = "failing.server_app:app"
clientapp = "failing.client_app:app"
[tool.flwr.app.config]
num-rounds = 1
server-raises = false
"""
SERVER = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from dare_agg.flower import DareStrategy

app = ServerApp()


@app.main()
def main(grid, context):
    if context.run_config["server-raises"]:
        raise ValueError("the server's own\\nmistake")
    start = ArrayRecord({"w": Array(np.zeros(4, np.float32))})
    strategy = DareStrategy(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)
    strategy.start(grid, start, num_rounds=context.run_config["num-rounds"])
"""
CLIENT = """
from flwr.clientapp import ClientApp
from dare_agg.flower import dare_mod

app = ClientApp(mods=[dare_mod])


@app.train()
def train(msg, context):
    raise KeyError("no such column: tone")
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A Flower app whose training fails, and whose server does where it is told to."""
    package = tmp_path / "failing-app" / "failing"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(APP)
    (package / "__init__.py").touch()
    (package / "server_app.py").write_text(SERVER)
    (package / "client_app.py").write_text(CLIENT)
    return package.parent


def run(app: Path, folder: Path, *words: str, terminal: bool = False) -> tuple[int, str]:
    """Exit status and what a run says, on pipes or on a terminal with NO_COLOR."""
    command = [sys.executable, "-m", "dare_agg.cli.main", "run", str(app), "-o", str(folder)]
    command += ["--clients", "1", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if not terminal:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
            check=False,
        )  # fmt: skip
        return done.returncode, done.stdout
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, "NO_COLOR": "1"}
    )
    os.close(theirs)
    said = b""
    try:
        while block := os.read(ours, 4096):
            said += block
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return process.wait(), said.decode()


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["-c", "server-raises=true"], "the server's own mistake"),
        ([], "no such column: tone"),
    ],
    ids=["server", "client"],
)
def test_a_failed_run_says_why_in_one_line(
    app: Path, tmp_path: Path, words: list[str], cause: str, terminal: bool
) -> None:
    folder = tmp_path / "run"
    status, said = run(app, folder, *words, terminal=terminal)
    assert status == 1
    *_, last = said.strip().splitlines()
    assert last.startswith("error: run ") and cause in last, said
    assert last.rstrip().endswith(f"log: {folder / 'run.log'}")
    for word in ("Traceback", "\x1b", "raise ", "ray::", "failed with exception", "'>"):
        assert word not in said, said
    assert len(said.splitlines()) < 6
    assert "Traceback" in (folder / "run.log").read_text()
    for log in folder.rglob("*.log"):
        assert "\x1b" not in log.read_text(), log


def test_a_warning_is_shown_once_and_errors_are_left_to_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = follow(tmp_path, stderr_console())
    long = "rejected client 1: client-error: " + "x" * 200
    for line in (
        "\x1b[92mINFO \x1b[0m:      [ROUND 1/2]",
        f"\x1b[93mWARNING \x1b[0m:   {long}",
        f"\x1b[93mWARNING \x1b[0m:   {long}",
        "\x1b[93mWARNING \x1b[0m:   Since flwr 1.32, default simulated SuperNodes changed",
        "\x1b[36m(ClientAppActor pid=7)\x1b[0m \x1b[93mWARNING \x1b[0m:   Manually terminating",
        "\x1b[91mERROR \x1b[0m:     Traceback (most recent call last):",
        '  File "x.py", line 1, in train',
        "KeyError: 'tone'",
    ):
        watch(line)
    assert capsys.readouterr().err.splitlines() == ["round 1 of 2 …", long]


def test_the_word_of_the_run_itself_goes_before_flowers(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    flowers = "Simulation failed with exception: no rows"
    assert failure(flowers, {}, {}, log) == "no rows"
    assert failure(flowers, {"token": "a", "error": "a file"}, {}, log) == "a file"
    # That of a run before, which this one did not come to replace.
    stale = {"token": "a", "error": "a file"}
    assert failure(flowers, stale, stale, log) == "no rows"
    # Where no app raised, Flower says only that something did: the log has it.
    none = "Simulation failed with exception: An error was encountered. Ending simulation."
    assert failure(none, {}, {}, log) == "An error was encountered. Ending simulation."
    log.write_text(
        "ERROR :     An exception occured!! The current node timed out during startup.\n"
        "ERROR :     Traceback (most recent call last):\n"
        "ERROR :     An exception occurred !! Simulation Runtime crashed.\n"
    )
    assert failure(none, {}, {}, log) == "The current node timed out during startup."


def test_messages_move_no_terminal() -> None:
    said = "\x1b[91mERROR\x1b[0m\x1b]0;title\x07 \x1b[2J\x1b(Bof\ta\nfile \x9b31m"
    assert plain_line(said) == "ERROR of a file  31m"
    assert str(DareError(said)).isprintable()
