"""Peak memory of the server against the number of clients, through the strategy itself.

``python -m simulations.bench_server_memory`` runs two rounds of `DareStrategy` with the version
downlink on a model of 22 million parameters, for 4 to 64 clients, each point in a process of
its own. Clients' replies are made one at a time, when they are pulled, as they come from a
network; what the made-up client holds is the same for every point. Writes
``results/server_memory.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

from simulations.memory_grid import MemoryGrid, pretend_task
from simulations.run import RESULTS, append_row, versions

PARAMETERS = 22_000_000
CLIENTS = (4, 8, 16, 32, 64)


class OneAtATime(MemoryGrid):
    """Keeps no message after it was handed over; a test's grid keeps them all."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = super().push_messages(messages)
        self.sent.clear()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = super().pull_messages(message_ids)
        self.received.clear()
        return replies


def measure(clients: int, parameters: int, drop_rate: str) -> dict[str, Any]:
    """Two rounds; returns the peak of this process."""
    from flwr.app import Array, ArrayRecord, Context, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    from dare_agg.flower import DareStrategy, dare_mod
    from dare_agg.versions import make_version_downlink

    pretend_task()
    app = ClientApp(mods=[dare_mod])

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        tuned = {}
        for name, array in msg.content["arrays"].items():  # type: ignore[union-attr]
            moved = array.numpy().copy()
            moved.reshape(-1)[int(context.node_config["partition-id"]) :: 97] += np.float32(1e-3)
            tuned[name] = Array(moved)
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": ArrayRecord(tuned), "metrics": metrics})
        return Message(content, reply_to=msg)

    base = np.random.default_rng(0).normal(scale=0.05, size=(parameters // 1000, 1000))
    initial = ArrayRecord({"w": Array(base.astype(np.float32))})
    del base
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DARE_AGG_CACHE"] = folder
        grid = OneAtATime(app, clients)
        strategy = DareStrategy(
            min_available_nodes=clients,
            min_train_nodes=clients,
            fraction_evaluate=0.0,
            drop_rate=drop_rate,
            seed=1,
            downlink=make_version_downlink("auto"),
        )
        strategy.start(grid, initial, num_rounds=2)
    measured = strategy.outcome.measurements if strategy.outcome else {}
    assert measured["accepted"] == clients, measured
    return {
        "clients": clients,
        "parameters": parameters,
        "drop_rate": drop_rate,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "updates_mib": round(sum(measured["update_bytes"]) / 2**20, 1),
        "dense_float32_mib": round(4 * parameters * clients / 2**20),
        "round_seconds": round(measured["seconds"], 1),
    }


def main() -> None:
    """Entry point: without ``--clients`` every point is run in its own process."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench_server_memory", description=__doc__
    )
    parser.add_argument("--clients", type=int, default=0, help="one point, printed")
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--drop-rate", default="0.9")
    parser.add_argument("--out", type=Path, default=RESULTS / "server_memory.jsonl")
    options = parser.parse_args()
    if options.clients:
        print(json.dumps(measure(options.clients, options.parameters, options.drop_rate)))
        return
    options.out.unlink(missing_ok=True)
    for clients in CLIENTS:
        command = [sys.executable, "-m", "simulations.bench_server_memory"]
        command += ["--clients", str(clients), "--parameters", str(options.parameters)]
        command += ["--drop-rate", options.drop_rate]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.strip().splitlines()[-1])
        append_row(options.out, {**row, "versions": versions()})
        print(row, flush=True)


if __name__ == "__main__":
    main()
