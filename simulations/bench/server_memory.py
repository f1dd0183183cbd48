"""Peak memory of the server against the number of clients, through the strategy itself.

``python -m simulations.bench.server_memory`` runs two rounds of `DareStrategy` with the version
downlink on a model of 22 million parameters, for 4 to 64 clients, each point in a process of
its own. Clients are made up: an update is encoded when its reply is pulled, one after another
as from a network, from a delta that exists tile by tile only, so that the peak is the server's
own. Writes ``results/server_memory.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from flwr.clientapp import ClientApp

from dare_agg.downlink.ways import make_downlink
from dare_agg.flower import DareStrategy
from simulations.runs.made_up import made_up_answer
from simulations.runs.memory_grid import WaitingGrid, over_the_wire, pretend_task
from simulations.runs.rows import RESULTS, append_row, versions

PARAMETERS = 22_000_000
CLIENTS = (4, 8, 16, 32, 64)


class MadeUpClients(WaitingGrid):
    """Nodes that hold the base and answer each plan with an update of a `Ripple`."""

    def _answer(self, message: Message) -> Message:
        number = self.partitions[message.metadata.dst_node_id]
        return over_the_wire(made_up_answer(message, number))


def measure(clients: int, parameters: int, drop_rate: str) -> dict[str, Any]:
    """Two rounds; returns the peak of this process."""
    pretend_task()
    base = np.random.default_rng(0).standard_normal((parameters // 1000, 1000), np.float32)
    initial = ArrayRecord({"w": Array(base)})
    del base
    strategy = DareStrategy(
        min_available_nodes=clients,
        min_train_nodes=clients,
        fraction_evaluate=0.0,
        drop_rate=drop_rate,
        seed=1,
        downlink=make_downlink("auto"),
    )
    strategy.start(MadeUpClients(ClientApp(), clients), initial, num_rounds=2)
    measured = strategy.outcome.measurements if strategy.outcome else {}
    assert measured["accepted"] == clients, measured
    return {
        "clients": clients,
        "parameters": parameters,
        "drop_rate": drop_rate,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "updates_mib": round(sum(measured["update_bytes"]) / 2**20, 1),
        "dense_float32_mib": round(4 * parameters * clients / 2**20),
    }


def main() -> None:
    """Entry point: without ``--clients`` every point is run in its own process."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.server_memory", description=__doc__
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
    # Coding for 64 clients too, the process would load the compiled loops (115 MiB).
    environment = {**os.environ, "DARE_AGG_KERNEL": "numpy"}
    for clients in CLIENTS:
        command = [sys.executable, "-m", "simulations.bench.server_memory"]
        command += ["--clients", str(clients), "--parameters", str(options.parameters)]
        command += ["--drop-rate", options.drop_rate]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        row = json.loads(done.stdout.strip().splitlines()[-1])
        append_row(options.out, {**row, "versions": versions()})
        print(row, flush=True)


if __name__ == "__main__":
    main()
