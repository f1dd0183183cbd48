"""Memory of several processes at a time, by what they do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from simulations.runs.looking import Looking
from simulations.runs.memory import memory_of

Groups = Callable[[], dict[str, list[int]]]


def descendants(pids: Iterable[int]) -> list[int]:
    """All processes that descend from these; Flower's tasks lead sessions of their own."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    new = list(pids)
    while new:
        new = [child for pid in new for child in children.get(pid, [])]
        found += new
    return found


def command_of(pid: int) -> str:
    """A process's command line; "" where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


class GroupPeaks(Looking):
    """Largest sum of own memory (``RssAnon``) of each group of processes, while it lasts.

    ``groups`` names the processes of each group; it is asked twice a second, and their memory
    looked at every 20 ms. ``own`` has the peaks in bytes, ``largest`` those of one process.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__(self.look, 0.02)
        self.own: dict[str, int] = {}
        self.largest: dict[str, int] = {}
        self._groups = groups
        self._asked, self._known = -1.0, dict[str, list[int]]()

    def look(self) -> None:
        """Look now."""
        if time.monotonic() - self._asked > 0.5:
            self._asked, self._known = time.monotonic(), self._groups()
        for name, pids in self._known.items():
            own = [_own(pid) for pid in pids]
            self.own[name] = max(self.own.get(name, 0), sum(own))
            self.largest[name] = max(self.largest.get(name, 0), *own, 0)


def _own(pid: int) -> int:
    try:
        return memory_of(pid)[0]
    except OSError:
        return 0
