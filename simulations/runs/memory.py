"""Memory of processes as Linux counts it, own pages apart from mapped files, and room on disks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simulations.runs.looking import Looking

_PERIOD = 0.02


def memory_of(pid: int | str = "self") -> tuple[int, int]:
    """Bytes of a process's own pages (``RssAnon``) and of mapped and shared files (the rest).

    Raises OSError where the process has ended.
    """
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssFile:", "RssShmem:")):
            name, value, _ = line.split()
            fields[name] = 1024 * int(value)
    if not fields:
        raise ProcessLookupError(f"process {pid} has ended")
    return fields["RssAnon:"], fields["RssFile:"] + fields["RssShmem:"]


class Peak(Looking):
    """The largest own memory (and mapped memory) of a process, seen every ``period`` seconds."""

    own = 0
    mapped = 0

    def __init__(self, pid: int | str = "self", period: float = _PERIOD) -> None:
        super().__init__(self.look, period)
        self._pid = pid

    def look(self) -> None:
        """Look now; raises OSError where the process has ended."""
        own, mapped = memory_of(self._pid)
        self.own, self.mapped = max(self.own, own), max(self.mapped, mapped)


def room_of(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk, whatever their lengths."""
    taken = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
            taken += 512 * file.lstat().st_blocks
    return taken


class PeakRoom(Looking):
    """The most that a folder's files took on the disk, seen every ``period`` seconds, or `look`."""

    most = 0

    def __init__(self, folder: Path, period: float = 0.2) -> None:
        super().__init__(self.look, period)
        self._folder = folder

    def look(self) -> None:
        """Look now."""
        self.most = max(self.most, room_of(self._folder))


@dataclass(frozen=True)
class Ran:
    """A command that has ended: its status, what it wrote, what it took."""

    status: int
    out: str
    err: str
    seconds: float
    cpu_seconds: float
    own_mib: int
    mapped_mib: int


def run_watched(
    command: Sequence[object],
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Ran:
    """Run a command to its end and watch the memory of its process, without its children's.

    CPU seconds are those of the process and of the children it waited for.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        child = subprocess.Popen(
            [str(word) for word in command], env=environment, cwd=folder, stdout=out, stderr=err
        )
        with Peak(child.pid) as peak:
            _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
    return Ran(
        child.returncode,
        *said,
        seconds,
        usage.ru_utime + usage.ru_stime,
        peak.own >> 20,
        peak.mapped >> 20,
    )
