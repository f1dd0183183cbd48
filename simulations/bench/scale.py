"""Server time and memory against clients and parameters, beside Flower's FedAvg.

``python -m simulations.bench.scale`` checks, decodes and merges synthetic updates as a server
does (`merge_deltas` with all its measurements, one thread); the result is a mapped file, so that
models that do not fit in memory are no exception. FedAvg is Flower's own function on full
float32 replies. ``results/scale.jsonl`` gets a line a point; each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from simulations.runs.memory import Peak, memory_of
from simulations.runs.rows import RESULTS, append_row, read_rows, versions

# (method, clients, parameters, drop rate)
POINTS = (
    *(("task-arithmetic", n, 1_000_000, "0.99") for n in (10, 100, 1_000, 10_000)),
    *(("task-arithmetic", 10, size, "0.99") for size in (10**7, 10**8, 10**9)),
    *(("task-arithmetic", 10, 10**8, rate) for rate in ("0.9", "0.999")),
    *(("ties", n, 1_000_000, "0.99") for n in (10, 100, 1_000, 10_000)),
    *(("fedavg", n, 1_000_000, "0") for n in (10, 100, 1_000)),
    *(("fedavg", 10, size, "0") for size in (10**7, 10**8)),
)


def measure(method: str, clients: int, parameters: int, drop_rate: str) -> dict[str, Any]:
    """Make updates (untimed), then check, decode and merge them as a server does."""
    from dare_agg.codec.derive import derive_key, seed_secret
    from dare_agg.codec.mask import parse_drop_rate
    from dare_agg.codec.update import decode_update, encode_update
    from dare_agg.merge.engine import merge_deltas
    from dare_agg.merge.methods import find_method
    from dare_agg.rounds.plan import make_plans
    from dare_agg.rounds.terms import UpdateTerms
    from dare_agg.vectors.layout import layout_of
    from dare_agg.vectors.model import ModelRef

    layout = layout_of({"w": (parameters,)})
    ref = ModelRef("00" * 32, layout.fingerprint, parameters)
    secret = derive_key(seed_secret(0), "round", 1)
    plans = make_plans(secret, 1, [None] * clients, UpdateTerms(parse_drop_rate(drop_rate)), ref)
    start = memory_of()[0]
    blobs = [encode_update(plan.spec(), _Waves(parameters)) for plan in plans]
    with tempfile.NamedTemporaryFile() as file, Peak() as peak:
        out: np.memmap = np.memmap(file.name, np.float32, "w+", shape=(parameters,))
        began = time.process_time()
        updates = [decode_update(b, p.spec()) for b, p in zip(blobs, plans, strict=True)]
        merge_deltas(
            layout,
            updates,
            method,
            weights=[1 / clients] * clients,
            options=find_method(method).federated,
            out=out,
        )
        seconds = time.process_time() - began
        mean = float(out.mean(dtype=np.float64))
    assert abs(mean - 1e-3) < 1e-4, f"the merged delta has mean {mean}, not that of what was sent"
    survivors = sum(update.survivors for update in updates)
    return _row(
        method, clients, parameters, drop_rate, survivors, len(blobs[0]), seconds, peak, start
    )


def measure_fedavg(clients: int, parameters: int) -> dict[str, Any]:
    """Flower's weighted mean of full replies, all of them in memory as its strategy has them."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    start = memory_of()[0]
    with Peak() as peak:
        replies = [
            RecordDict(
                {
                    "arrays": ArrayRecord({"w": Array(np.full(parameters, 1e-3, np.float32))}),
                    "metrics": MetricRecord({"num-examples": 1}),
                }
            )
            for _ in range(clients)
        ]
        began = time.process_time()
        aggregate_arrayrecords(replies, "num-examples")
        seconds = time.process_time() - began
    survivors, nbytes = clients * parameters, 4 * parameters
    return _row("fedavg", clients, parameters, "0", survivors, nbytes, seconds, peak, start)


def _row(
    method: str,
    clients: int,
    parameters: int,
    drop_rate: str,
    survivors: int,
    nbytes: int,
    seconds: float,
    peak: Peak,
    start: int,
) -> dict[str, Any]:
    return {
        "method": method,
        "clients": clients,
        "parameters": parameters,
        "drop_rate": drop_rate,
        "survivors": survivors,
        "update_bytes": nbytes,
        "server_cpu_seconds": round(seconds, 3),
        "peak_mib": round((peak.own - start) / 2**20),
        "model_mib": round(4 * parameters / 2**20),
    }


class _Waves:
    """A delta made on the fly: 1e-3 with a small ripple, so that no dense vector is held."""

    def __init__(self, size: int) -> None:
        self.size = size

    def take(self, positions: np.ndarray) -> np.ndarray:
        return np.where(positions % 2 == 0, np.float32(1.2e-3), np.float32(8e-4))

    def read(self, lo: int, hi: int, out: np.ndarray) -> None:
        out[:] = self.take(np.arange(lo, hi))


def main() -> None:
    """Entry point: without ``--point`` every missing point is run in its own process."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.scale", description=__doc__)
    parser.add_argument("--point", default="", help="one point: method,clients,parameters,rate")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.jsonl")
    options = parser.parse_args()
    if options.point:
        method, clients, parameters, rate = options.point.split(",")
        if method == "fedavg":
            print(json.dumps(measure_fedavg(int(clients), int(parameters))))
        else:
            print(json.dumps(measure(method, int(clients), int(parameters), rate)))
        return
    known = ("method", "clients", "parameters", "drop_rate")
    done = {tuple(row[key] for key in known) for row in read_rows(options.out)}
    # Coding for the clients too, the process would load the compiled loops at its end (45 MiB).
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DARE_AGG_KERNEL": "numpy"}
    for point in POINTS:
        if point in done:
            continue
        text = ",".join(map(str, point))
        command = [sys.executable, "-m", "simulations.bench.scale", "--point", text]
        output = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
        row = json.loads(output)
        append_row(options.out, {**row, "versions": versions()})
        print(row, flush=True)


if __name__ == "__main__":
    main()
