"""Running the Flower app: a SuperLink of our own, the run's true status, nothing left behind.

``flwr run --stream`` exits 0 when a run failed, and its managed SuperLink outlives it. This
starts a SuperLink on free loopback ports with its own home and a neutral working directory,
submits the app, follows it, asks for the run's status and stops what it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dare_agg.errors import RunError, plain_line
from dare_agg.files.atomic import replace_file
from dare_agg.files.json_text import parse_json
from dare_agg.flower.processes.ending import (
    KINDLY_SECONDS,
    command_of,
    end_family,
    family,
    stop_group,
)

START_SECONDS = 120
AWAY_SECONDS = 300
# A run that has ended says so within it, whatever ended first.
TROUBLE_SECONDS = 5.0
_STARTED = re.compile(r"started run (\d+)")
ConfigScalar = bool | int | float | str


@dataclass(frozen=True)
class RunStatus:
    """How a run ended: Flower's status words and our reading of them."""

    run_id: str
    status: str
    detail: str

    @property
    def ok(self) -> bool:
        """Whether the run completed: what the exit status says."""
        return self.status == "finished:completed"


def flower_environment(home: Path) -> dict[str, str]:
    """The environment Flower's processes get: own home, no telemetry, no installs."""
    environment = dict(os.environ)
    bin_folder = str(Path(sys.executable).parent)
    environment["PATH"] = bin_folder + os.pathsep + environment.get("PATH", "")
    environment.update(
        FLWR_HOME=str(home),
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
        RAY_DEDUP_LOGS="0",
        RAY_memory_monitor_refresh_ms="0",
        OMP_NUM_THREADS=environment.get("OMP_NUM_THREADS", "1"),
        TOKENIZERS_PARALLELISM="false",
        PYTHONUNBUFFERED="1",
    )
    return environment


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Simulation:
    """A SuperLink of our own in simulation mode: its address, home and process."""

    address: str
    home: Path
    process: subprocess.Popen
    _begun: bool = False

    def trouble(self) -> str:
        """What has ended that the run cannot do without; "" while all is there."""
        if self.process.poll() is not None:
            return f"the SuperLink ended with status {self.process.returncode}"
        if any("flwr-simulation" in command_of(pid) for pid in family(self.home)):
            self._begun = True
        elif self._begun:
            return (
                "the simulation's process died (killed, most often because memory ran out): let "
                "fewer clients run side by side (--cpus), then go on with dare-agg run --resume"
            )
        return ""


class _Watch:
    """Ends ``process`` when something is in trouble for `TROUBLE_SECONDS`, and keeps the word."""

    def __init__(self, process: subprocess.Popen, trouble: Callable[[], str]) -> None:
        self.process, self.trouble, self.said = process, trouble, ""
        self._stop = threading.Event()

    def __enter__(self) -> _Watch:
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _look(self) -> None:
        since = time.monotonic()
        while not self._stop.wait(1.0):
            if not (said := self.trouble()):
                since = time.monotonic()
            elif time.monotonic() - since > TROUBLE_SECONDS:
                # What ended well is known to the SuperLink by now.
                self.said = said
                self.process.terminate()
                return


@contextlib.contextmanager
def simulation_superlink(home: Path) -> Iterator[Simulation]:
    """Start a SuperLink in simulation mode; at the end it and all it started are ended."""
    home.mkdir(parents=True, exist_ok=True)
    work = home / "work"
    work.mkdir(exist_ok=True)
    environment = flower_environment(home)
    port, control = free_port(), free_port()
    log = (home / "superlink.log").open("ab")
    command = [
        "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess",
        "--control-api-address", f"127.0.0.1:{control}",
        "--host", "127.0.0.1", "--port", str(port), "--database", str(home / "state.db"),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=work, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        wait_healthy(process, port, home / "superlink.log")
        yield Simulation(f"127.0.0.1:{port}", home, process)
    finally:
        end_family(home)
        stop_group(process, KINDLY_SECONDS)
        log.close()
        _without_colours(home / "superlink.log")


def _without_colours(log: Path) -> None:
    """Make a log plain text; Flower and Ray colour whatever they write."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if "\x1b" in text:
        replace_file(log, (f"{plain_line(line)}\n".encode() for line in text.splitlines()))


def wait_healthy(process: subprocess.Popen, port: int, log: Path) -> None:
    """Wait until a SuperLink answers; `RunError` where it ends or takes `START_SECONDS`."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RunError(f"the SuperLink ended with status {process.returncode}; see {log}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RunError(f"the SuperLink did not answer within {START_SECONDS} s; see {log}")


def toml_scalars(values: Mapping[str, ConfigScalar]) -> str:
    """Render overrides as Flower's ``key=value key=value``."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


def write_connection(home: Path, name: str, lines: Mapping[str, ConfigScalar]) -> None:
    """Write ``config.toml`` in a Flower home with one connection, the default."""
    body = "\n".join(f"{key} = {json.dumps(value)}" for key, value in lines.items())
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{name}"\n\n[superlink.{name}]\n{body}\n', encoding="utf-8"
    )


def run_app(
    app: Path,
    home: Path,
    connection: str,
    overrides: Mapping[str, ConfigScalar],
    *,
    federation_config: Mapping[str, ConfigScalar] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
    simulation: Simulation | None = None,
) -> RunStatus:
    """Submit the app over a connection of ``home``, follow its log, return its true status.

    Of a ``simulation`` of our own it is also seen that it still lives. Raises `RunError` when the
    app could not be submitted. Interrupting stops the run, unless a simulation ends with its
    SuperLink anyway.
    """
    environment = flower_environment(home)
    work = home / "work"
    work.mkdir(exist_ok=True)
    command = ["flwr", "run", str(app), connection, "--stream"]
    if overrides:
        command += ["--run-config", toml_scalars(overrides)]
    if federation_config:
        command += ["--federation-config", toml_scalars(federation_config)]
    before = set(_runs(environment, work, connection))
    process = subprocess.Popen(
        command,
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    tail: list[str] = []
    run_id = ""
    assert process.stdout is not None
    with _Watch(process, simulation.trouble if simulation else str) as watch:
        try:
            for raw in process.stdout:
                line = plain_line(raw.rstrip())
                tail = [*tail[-30:], line]
                if not run_id and (started := _STARTED.search(line)):
                    run_id = started[1]
                on_line(line)
            process.wait()
        except KeyboardInterrupt:
            if simulation is None:
                _stop_runs(environment, work, connection, run_id, before)
            raise
        finally:
            stop_group(process, KINDLY_SECONDS)
        if not run_id and not watch.said:
            run_id = next(iter(_new_runs(environment, work, connection, before)), "")
        if not run_id:
            said = watch.said or " ".join(line for line in tail[-6:] if line)[:600]
            raise RunError(
                f"the app was not accepted (flwr run ended with {process.returncode}): {said}"
            )
        return _final_status(environment, work, connection, run_id, on_line, watch)


def _stop_runs(
    environment: Mapping[str, str], work: Path, connection: str, run_id: str, before: set[str]
) -> None:
    """Have the SuperLink stop the run; one whose id was not told yet is whatever is new."""
    for one in [run_id] if run_id else set(_runs(environment, work, connection)) - before:
        subprocess.run(
            ["flwr", "stop", one, connection],
            cwd=work, env=environment, capture_output=True, timeout=60, check=False,
        )  # fmt: skip


def _new_runs(
    environment: Mapping[str, str], work: Path, connection: str, before: set[str]
) -> list[str]:
    """The runs that were not there before; waits for a SuperLink that is being restarted."""
    until = time.monotonic() + 60
    while True:
        try:
            return [run for run in _runs(environment, work, connection) if run not in before]
        except RunError:
            if time.monotonic() > until:
                raise
            time.sleep(1)


def _final_status(
    environment: Mapping[str, str],
    work: Path,
    connection: str,
    run_id: str,
    on_line: Callable[[str], None],
    watch: _Watch,
) -> RunStatus:
    """Wait until the run has ended by Flower's own account.

    With process isolation a run outlives its SuperLink, the stream of its log does not: then
    the run is followed by its status, for as long as the SuperLink is away no more than
    `AWAY_SECONDS`.
    """
    until = time.monotonic() + AWAY_SECONDS
    pause = 1.0
    while True:
        try:
            status, detail = _runs(environment, work, connection).get(run_id, ("unknown", ""))
        except RunError as error:  # the SuperLink may be on its way back
            status, detail = "unknown", str(error)
        else:
            if status != "unknown":
                until = time.monotonic() + AWAY_SECONDS
        if status.startswith("finished") or time.monotonic() > until:
            return RunStatus(run_id, status, detail)
        if watch.said:
            return RunStatus(run_id, "failed", watch.said)
        on_line("")
        time.sleep(pause)
        pause = min(10.0, pause * 1.5)


def _runs(
    environment: Mapping[str, str], work: Path, connection: str
) -> dict[str, tuple[str, str]]:
    """All runs of a SuperLink: id → (status, details)."""
    done = subprocess.run(
        ["flwr", "ls", connection, "--format", "json"],
        cwd=work, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    start = done.stdout.find("{")
    try:
        answer = parse_json(done.stdout[start:])
    except ValueError as error:
        raise RunError(
            f"flwr ls gave no answer: {' '.join((done.stdout + done.stderr).split())[:300]}"
        ) from error
    if not answer.get("success", True):
        raise RunError(
            f"flwr ls failed: {' '.join(str(answer.get('error-message', '')).split())[:300]}"
        )
    return {
        str(run.get("run-id")): (str(run.get("status")), str(run.get("status-details", "")))
        for run in answer.get("runs", [])
    }
