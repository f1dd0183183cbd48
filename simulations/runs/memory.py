"""Memory of processes as Linux counts it, own pages apart from mapped files, and room on disks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

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


class Peak:
    """The largest own memory (and mapped memory) of a process, seen every ``period`` seconds.

    ``cpu_seconds`` is what looking has cost so far.
    """

    own = 0
    mapped = 0
    cpu_seconds = 0.0

    def __init__(self, pid: int | str = "self", period: float = _PERIOD) -> None:
        self._pid, self._period = pid, period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            try:
                own, mapped = memory_of(self._pid)
            except OSError:
                return
            self.own, self.mapped = max(self.own, own), max(self.mapped, mapped)
            self.cpu_seconds = time.thread_time()
            if self._stop.wait(self._period):
                return


def room_of(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk, whatever their lengths."""
    taken = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
            taken += 512 * file.lstat().st_blocks
    return taken


class PeakRoom:
    """The most that a folder's files took on the disk, seen every ``period`` seconds, or `look`.

    ``cpu_seconds`` is what looking has cost its own thread so far.
    """

    most = 0
    cpu_seconds = 0.0

    def __init__(self, folder: Path, period: float = 0.2) -> None:
        self._folder, self._period = folder, period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakRoom:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        """Look now."""
        self.most = max(self.most, room_of(self._folder))

    def _watch(self) -> None:
        while not self._stop.wait(self._period):
            self.look()
            self.cpu_seconds = time.thread_time()


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
