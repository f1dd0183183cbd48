"""Ending what a run started, all of it.

Flower's simulation and Ray's workers lead sessions of their own and outlive those that started
them. What they inherit is FLWR_HOME, a folder of this run alone: by it, and by who started whom,
they are found (Linux; elsewhere only the first process and its group are ended).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from functools import cache
from pathlib import Path

KINDLY_SECONDS = 3.0
AT_MOST_SECONDS = 6.0


@cache
def sessions_of(home: Path) -> set[int]:
    """The sessions in which this process has seen members of a `family`, its own apart."""
    return set()


def family(home: Path) -> set[int]:
    """Ids of the processes that have ``home`` as their FLWR_HOME, and of all they started.

    Whoever is in a session in which such processes were seen is one too: what is about to start
    has no environment yet, and its parent may be gone.
    """
    mark = f"FLWR_HOME={home}\0".encode()
    sessions = sessions_of(home)
    session_of: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    found: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if state == "Z" or pid == os.getpid():
                continue
            session_of[pid] = int(session)
            children.setdefault(int(parent), []).append(pid)
            # Some of Flower's let nobody read their environment.
            if mark in (entry / "environ").read_bytes() + b"\0":
                found.add(pid)
    new = list(found)
    while new:
        new = [pid for parent in new for pid in children.get(parent, ()) if pid not in found]
        found.update(new)
    sessions.update(session_of[pid] for pid in found)
    sessions.discard(os.getsid(0))
    # The number of one that is over may be given to strangers.
    sessions.intersection_update(session_of.values())
    return found | {pid for pid, session in session_of.items() if session in sessions}


def command_of(pid: int) -> str:
    """The command line of a process; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "?")
    except (OSError, UnicodeError):
        return ""


def end_family(home: Path, kindly: float = KINDLY_SECONDS) -> None:
    """End a run's `family`: SIGTERM, and after ``kindly`` seconds SIGKILL, until it is gone."""
    began = time.monotonic()
    told: set[int] = set()
    while left := family(home):
        elapsed = time.monotonic() - began
        if elapsed > AT_MOST_SECONDS:
            return
        late = elapsed >= kindly
        for pid in left if late else left - told:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        told |= left
        time.sleep(0.1)


def stop_group(process: subprocess.Popen, patience: float = 20.0) -> None:
    """End a process and all its children (its own process group): first kindly, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    # Children that outlived the leader are still in its group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
