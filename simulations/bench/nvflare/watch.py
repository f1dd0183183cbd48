"""What a job's processes take while it runs: memory by party, bytes of sockets by round."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulations.bench.exchange.network import Sockets
from simulations.runs.process_groups import GroupPeaks, Groups

LOOK = 0.1


@dataclass
class Watch:
    """Counters of each client's sockets at the moments when a model has come.

    The training script notes a model in ``log`` and waits for a file before it goes on
    (`train.py`), so that the counters are read while nothing travels, however busy the machine is.
    """

    groups: Groups
    log: Path
    port: int | None = None
    sockets: Sockets = field(default_factory=Sockets)
    pids: dict[str, set[int]] = field(default_factory=dict)
    came: dict[tuple[str, int], tuple[float, int, int]] = field(default_factory=dict)

    def look(self) -> None:
        """Read all counters, and let clients go on whose models have come since."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        for name, pids in self.groups().items():
            self.pids.setdefault(name, set()).update(pids)
        self.sockets.look()
        for line in map(json.loads, lines[len(self.came) :]):
            client, number = line["client"], line["round"]
            sent, received = self.sockets.of(self.pids.get(client, set()), self.port)
            self.came[client, number] = line["time"], sent, received
            Path(f"{self.log}.{client}.{number}").touch()

    def figures(self) -> dict[str, Any]:
        """Means over clients, and over the rounds from one model's coming to the next one's.

        ``first_down`` is what came up to the first model, start of the job included.
        """
        pairs = [
            (self.came[client, number], self.came[client, number + 1])
            for client, number in self.came
            if (client, number + 1) in self.came
        ]
        if not pairs:
            raise SystemExit("error: no client saw two rounds")
        return {
            "up": round(statistics.mean(after[1] - before[1] for before, after in pairs)),
            "down": round(statistics.mean(after[2] - before[2] for before, after in pairs)),
            "first_down": round(
                statistics.mean(came[2] for (_, number), came in self.came.items() if number == 0)
            ),
            "seconds_a_round": round(
                statistics.median(after[0] - before[0] for before, after in pairs), 1
            ),
        }


def watch_job(running: Callable[[], bool], watch: Watch) -> dict[str, Any]:
    """Watch a job until it ends; the figures of its row."""
    with GroupPeaks(watch.groups) as peaks:
        while running():
            watch.look()
            time.sleep(LOOK)
    return {
        "models_received": len(watch.came),
        **(watch.figures() if watch.came else {}),
        "server_anonymous_mib": peaks.own.get("server", 0) >> 20,
        "client_anonymous_mib": max(
            (size for name, size in peaks.own.items() if name != "server"), default=0
        )
        >> 20,
    }
