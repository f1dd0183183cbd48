"""Networks of their own, so that what travels can be counted: network namespaces of Linux."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import TracebackType


class Namespace:
    """A network namespace with a line to this machine; ``prefix`` runs a command in it.

    ``far`` is its own address, ``near`` this machine's as it sees it. Needs root and iproute2.
    """

    def __init__(self) -> None:
        self.name = f"dare-exchange-{os.getpid()}"
        self.prefix = ["ip", "netns", "exec", self.name]
        net = f"10.213.{os.getpid() % 256}"
        self.near, self.far = f"{net}.1", f"{net}.2"

    def __enter__(self) -> Namespace:
        here, there = f"dxn{os.getpid()}", f"dxf{os.getpid()}"
        inside = ["ip", "-n", self.name]
        _do("ip", "netns", "add", self.name)
        try:
            _do("ip", "link", "add", here, "type", "veth", "peer", "name", there)
            _do("ip", "link", "set", there, "netns", self.name)
            _do("ip", "addr", "add", f"{self.near}/30", "dev", here)
            _do("ip", "link", "set", here, "up")
            _do(*inside, "addr", "add", f"{self.far}/30", "dev", there)
            _do(*inside, "link", "set", there, "up")
            _do(*inside, "link", "set", "lo", "up")
        except BaseException:
            self._remove()
            raise
        self._device = Path(f"/sys/class/net/{here}/statistics")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)

    def carried(self) -> tuple[int, int]:
        """Bytes of the line so far: up (from the namespace) and down."""
        up, down = (int((self._device / f"{way}_bytes").read_text()) for way in ("rx", "tx"))
        return up, down


class Sockets:
    """What the TCP sockets of some processes, here or in a namespace, have sent and received.

    A socket is seen while it is open: ``look`` has to be called now and then, and once more
    while the last bytes of each are past.
    """

    def __init__(self, namespace: Namespace | None = None) -> None:
        self._command = [*(namespace.prefix if namespace else ()), "ss", "-tinpHO"]
        self._seen: dict[tuple[int, str], tuple[int, int]] = {}

    def look(self) -> None:
        """Read the counters of all open sockets."""
        done = subprocess.run(self._command, capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            words = line.split()
            pids = re.findall(r"pid=(\d+)", line)
            sent, received = (
                re.search(rf"\b{name}:(\d+)", line) for name in ("bytes_sent", "bytes_received")
            )
            counts = (int(sent[1]) if sent else 0, int(received[1]) if received else 0)
            for pid in pids:
                key = int(pid), f"{words[3]} {words[4]}"
                before = self._seen.get(key, (0, 0))
                self._seen[key] = max(before[0], counts[0]), max(before[1], counts[1])

    def of(self, pids: set[int], port: int | None = None) -> tuple[int, int]:
        """Bytes that sockets of these processes (to a port) sent and received."""
        end = "" if port is None else f":{port}"
        counts = [
            seen for (pid, ends), seen in self._seen.items() if pid in pids and ends.endswith(end)
        ]
        return sum(sent for sent, _ in counts), sum(received for _, received in counts)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
