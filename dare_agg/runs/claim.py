"""Whose a run folder is: one run's at a time, and what a run left there is never written over.

Both the command that follows a run and the server that makes it claim the folder, each with a
lock of its own. A lock is its process's: however that one ends, the folder is free again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dare_agg.errors import StateError
from dare_agg.files.atomic import replace_file
from dare_agg.files.json_text import read_json
from dare_agg.runs.ending import COMPLETED
from dare_agg.runs.log import planned_rounds
from dare_agg.runs.now import NOW_FILE
from dare_agg.runs.rows import METRICS_FILE, STATE_FILE, RunRow, read_rows

LOG_FILE = "run.log"
SIMULATION_FILE = "simulation.json"
# The locks of the command and of the server.
COMMAND, SERVER = ".command.lock", ".server.lock"
# What a run that finished no round may have left; another one may take its place.
_LEFT = {COMMAND, SERVER, LOG_FILE, METRICS_FILE, NOW_FILE, STATE_FILE}
_LEFT |= {SIMULATION_FILE, "flower", "keys", "state", "tensorboard"}
_MOST_NAMES = 3
_OTHER = "name another folder: --output (output in a run config)"


@contextlib.contextmanager
def claim(folder: Path, lock: str, *, resume: bool = False, rounds: int = 0) -> Iterator[None]:
    """Have ``folder`` to oneself as long as the context lasts; see `check_folder` for the rest.

    ``lock`` is `COMMAND` or `SERVER`. Raises `StateError`, and leaves the folder as it was,
    where another process has it or it cannot be written.
    """
    check_folder(folder, resume=resume, rounds=rounds)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise StateError(
            f"{folder} cannot be written: {error.strerror or error}; fix the permissions, or "
            f"{_OTHER}"
        ) from error
    try:
        _take(handle, folder, lock)
        # Another run may have come and gone since the first look.
        check_folder(folder, resume=resume, rounds=rounds)
        os.truncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def is_claimed(folder: Path) -> bool:
    """Whether a command or a server is at work in ``folder`` on this machine."""
    return any(_is_held(folder / lock) for lock in (COMMAND, SERVER))


def _is_held(lock: Path) -> bool:
    try:
        handle = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _take(handle: int, folder: Path, lock: str) -> None:
    """Take a lock; the command's only where no server that outlived its command is at work."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = SERVER if lock == COMMAND and _is_held(folder / SERVER) else ""
    except OSError:
        held = lock
    if held:
        raise StateError(
            f"another run is at work in {folder}{_process(folder / held)}: wait for it, or {_OTHER}"
        )


def _process(lock: Path) -> str:
    try:
        return f" (process {int(lock.read_text(encoding='ascii'))})"
    except (OSError, ValueError):
        return ""


def check_folder(folder: Path, *, resume: bool = False, rounds: int = 0) -> None:
    """Raise `StateError` where a run may not begin in ``folder``, or with ``resume`` go on there.

    A run begins where there is nothing, or what one left that finished no round. It goes on
    where one stands that is not finished; ``rounds`` above those it has make it unfinished.
    Nothing is changed.
    """
    if folder.exists() and not folder.is_dir():
        raise StateError(f"{folder} is a file; {_OTHER}")
    if resume:
        _check_resumed(folder, rounds)
        return
    try:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise StateError(f"{folder} cannot be read: {error.strerror}; {_OTHER}") from error
    state, rows = run_state(folder), _rows(folder)
    if state.get("status") == COMPLETED:
        raise StateError(f"{folder} holds a finished run ({_extent(rows, state)}); {_OTHER}")
    if rows:
        raise StateError(
            f"{folder} holds a run that is not finished ({_extent(rows, state)}); go on with it: "
            f"dare-agg run --resume {folder}, or {_OTHER}"
        )
    if foreign := sorted(names - _LEFT):
        more = len(foreign) - _MOST_NAMES
        shown = ", ".join(foreign[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
        raise StateError(
            f"{folder} holds what is no run's: {shown}; name a new or an empty folder: --output "
            "(output in a run config)"
        )


def _check_resumed(folder: Path, rounds: int) -> None:
    state, rows = run_state(folder), _rows(folder)
    if not state:
        raise StateError(
            f"{folder} holds no run to resume: it has no {STATE_FILE} that can be read; give the "
            "folder that dare-agg run --output named"
        )
    done = min(last.values(), default=0) if (last := _last_rounds(rows)) else 0
    most = max(last.values(), default=0)
    if rounds and most > rounds:
        raise StateError(
            f"{folder} has {most} rounds already, num-rounds = {rounds}; give at least {most}"
        )
    if state.get("status") == COMPLETED and done >= (rounds or done):
        raise StateError(
            f"{folder} holds a finished run ({_extent(rows, state)}): nothing is left to resume; "
            f"see dare-agg report {folder}, or let it have more rounds: -c num-rounds={done + 1}"
        )


def write_simulation(folder: Path, clients: int) -> None:
    """Note among how many clients a simulation divides its data."""
    replace_file(folder / SIMULATION_FILE, (json.dumps({"clients": clients}).encode() + b"\n",))


def read_simulation(folder: Path) -> int | None:
    """Of how many clients the simulation in ``folder`` is; None where nothing says it.

    Runs of earlier versions say it by their ``min-clients`` alone.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(read_json(folder / SIMULATION_FILE)["clients"])
    config = run_state(folder).get("config")
    found = config.get("min-clients") if isinstance(config, dict) else None
    return found if type(found) is int else None


def run_state(folder: Path) -> Mapping[str, Any]:
    """What run.json says; empty where there is none, or none that can be read."""
    try:
        state = read_json(folder / STATE_FILE)
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _rows(folder: Path) -> list[RunRow]:
    try:
        return read_rows(folder / METRICS_FILE, strict=False)
    except OSError:
        return []


def _last_rounds(rows: Sequence[RunRow]) -> dict[str, int]:
    return {row.method: row.round for row in rows}


def _extent(rows: Sequence[RunRow], state: Mapping[str, Any]) -> str:
    """How far a run came: "fedavg: 3 of 5 rounds, dare-ties: 1 of 5"."""
    config = state.get("config")
    planned = planned_rounds(config) if isinstance(config, dict) else 0
    total = f" of {planned}" if planned else ""
    last = _last_rounds(rows)
    return ", ".join(f"{method}: {last[method]}{total} rounds" for method in last) or "no round"
