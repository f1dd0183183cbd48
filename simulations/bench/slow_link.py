"""A slow link on this machine: a network namespace behind a shaped, lossy, distant line.

Both ends are TUN devices whose rates are shaped with ``tc`` (token buckets); a thread carries
the packets between them, late by ``delay`` and without those that get lost. (Kernels without
``netem`` are common; this needs root, iproute2 and /dev/net/tun only.)

>>> with SlowLink(1) as link:                                       # doctest: +SKIP
...     subprocess.run([*link.prefix, "ping", "-c", "3", link.gateway])
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

TUNSETIFF = 0x400454CA
IFF_TUN_NO_PI = 0x1001
PACKET_BYTES = 65536


def why_not() -> str:
    """Why no link can be made here; "" where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is missing: install iproute2"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"/dev/net/tun: {error.strerror}"
    name = f"dare-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "network namespaces cannot be made here"
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return ""


@dataclass
class SlowLink:
    """A line to namespace ``prefix`` runs commands in; use it as a context.

    Rates in kbit/s (up: from the namespace); ``delay`` in seconds and ``loss`` as a share,
    both each way: a ping takes twice the delay. ``carried`` counts the bytes of IP packets up
    and down.
    """

    number: int
    up_kbit_s: int = 300
    down_kbit_s: int = 1000
    delay: float = 0.05
    loss: float = 0.01
    seed: int = 0
    carried: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    lost: int = 0

    @property
    def namespace(self) -> str:
        return f"dare-{os.getpid()}-{self.number}"

    @property
    def gateway(self) -> str:
        """This machine's address as the namespace sees it."""
        return f"{self._net}.{4 * self.number + 1}"

    @property
    def prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace]

    @property
    def _net(self) -> str:
        return f"10.211.{os.getpid() % 256}"

    def __enter__(self) -> SlowLink:
        near, far = f"dn{os.getpid()}-{self.number}", f"df{os.getpid()}-{self.number}"
        self._fds = (_tun(near), _tun(far))
        address = f"{self._net}.{4 * self.number + 2}"
        inside = ["ip", "-n", self.namespace]
        try:
            _do("ip", "netns", "add", self.namespace)
            _do("ip", "link", "set", far, "netns", self.namespace)
            _do("ip", "addr", "add", f"{self.gateway}/30", "dev", near)
            _do(*inside, "addr", "add", f"{address}/30", "dev", far)
            _do("ip", "link", "set", near, "up")
            _do(*inside, "link", "set", "lo", "up")
            _do(*inside, "link", "set", far, "up")
            _do(*inside, "route", "add", "default", "via", self.gateway)
            _do("tc", "qdisc", "replace", "dev", near, *_bucket(self.down_kbit_s))
            shaped = ["tc", "-n", self.namespace, "qdisc", "replace", "dev", far]
            _do(*shaped, *_bucket(self.up_kbit_s))
        except BaseException:
            self._remove()
            raise
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, daemon=True)
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
        self._remove()

    def _remove(self) -> None:
        for descriptor in self._fds:
            os.close(descriptor)
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True, check=False)

    def _carry(self) -> None:
        near, far = self._fds
        rng = random.Random(self.seed)
        on_the_way: list[tuple[float, int, int, bytes]] = []
        count = 0
        while not self._stop.is_set():
            now = time.monotonic()
            while on_the_way and on_the_way[0][0] <= now:
                _, _, end, packet = heapq.heappop(on_the_way)
                try:
                    os.write(end, packet)
                except OSError:  # the other end is full or down: lost, as on a real line
                    self.lost += 1
            patience = min(0.2, on_the_way[0][0] - now) if on_the_way else 0.2
            for source in select.select([near, far], [], [], max(0.0, patience))[0]:
                packet = os.read(source, PACKET_BYTES)
                if rng.random() < self.loss:
                    self.lost += 1
                    continue
                count += 1
                self.carried["down" if source == near else "up"] += len(packet)
                end = far if source == near else near
                heapq.heappush(on_the_way, (time.monotonic() + self.delay, count, end, packet))


def _tun(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN_NO_PI))
    return descriptor


def _bucket(kbit_s: int) -> list[str]:
    """A token bucket with a second or so of queue, as modems have."""
    return ["root", "tbf", "rate", f"{kbit_s}kbit", "burst", "4kb", "latency", "800ms"]


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
