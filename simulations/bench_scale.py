"""Server time and memory against clients and parameters.

``python -m simulations.bench_scale`` checks, decodes and merges synthetic updates with the merge
engine, as a server does, and writes the result to a file tile by tile, so that models that do
not fit in memory are no exception. ``results/scale.jsonl`` gets a line a point; each runs in a
process of its own, so that its peak is its own.
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

from simulations.run import RESULTS, append_row, read_rows, versions

# (clients, parameters, drop rate)
POINTS = (
    *((n, 1_000_000, "0.99") for n in (10, 100, 1_000, 10_000)),
    *((10, size, "0.99") for size in (10_000_000, 100_000_000, 1_000_000_000)),
    *((10, 100_000_000, rate) for rate in ("0.9", "0.999")),
)


def measure(clients: int, parameters: int, drop_rate: str) -> dict[str, Any]:
    """Encode updates (untimed), then check, decode and merge them as a server does."""
    from dare_agg.derive import derive_key, seed_secret
    from dare_agg.layout import layout_of
    from dare_agg.mask import parse_drop_rate
    from dare_agg.merge.engine import TILE, prepare_merge
    from dare_agg.merge.task import Scratch
    from dare_agg.plan import ModelRef, PlanSettings, make_plans
    from dare_agg.update import decode_update, encode_update

    layout = layout_of({"w": (parameters,)})
    ref = ModelRef("00" * 32, layout.fingerprint, parameters)
    secret = derive_key(seed_secret(0), "round", 1)
    plans = make_plans(secret, 1, [None] * clients, PlanSettings(parse_drop_rate(drop_rate)), ref)
    blobs = [encode_update(plan.spec(), _Waves(parameters)) for plan in plans]
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    out, scratch, total = np.empty(TILE, np.float32), Scratch(), 0.0
    began = time.process_time()
    updates = [decode_update(b, p.spec()) for b, p in zip(blobs, plans, strict=True)]
    kernel, task = prepare_merge(
        layout, updates, "task-arithmetic", weights=[1 / clients] * clients
    )
    with tempfile.TemporaryFile() as file:
        for lo, hi in task.tiles():
            kernel(lo, hi, out[: hi - lo], scratch)
            file.write(out[: hi - lo])
            total += float(out[: hi - lo].sum(dtype=np.float64))
    seconds = time.process_time() - began
    assert abs(total / parameters - 1e-3) < 1e-4, "the merged delta is not the one that was sent"
    return {
        "clients": clients,
        "parameters": parameters,
        "drop_rate": drop_rate,
        "update_bytes": len(blobs[0]),
        "all_update_bytes": sum(map(len, blobs)),
        "survivors": updates[0].survivors * clients,
        "server_cpu_seconds": round(seconds, 3),
        "peak_mib": round(_memory("VmHWM")),
        "before_mib": round(before),
        "model_mib": round(4 * parameters / 2**20),
    }


def _memory(name: str) -> float:
    """This process's memory in MiB, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


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
    parser = argparse.ArgumentParser(prog="python -m simulations.bench_scale", description=__doc__)
    parser.add_argument("--point", default="", help="one point: clients,parameters,drop rate")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.jsonl")
    options = parser.parse_args()
    if options.point:
        clients, parameters, rate = options.point.split(",")
        print(json.dumps(measure(int(clients), int(parameters), rate)))
        return
    done = {(r["clients"], r["parameters"], r["drop_rate"]) for r in read_rows(options.out)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for point in POINTS:
        if point in done:
            continue
        text = ",".join(map(str, point))
        command = [sys.executable, "-m", "simulations.bench_scale", "--point", text]
        output = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
        row = json.loads(output)
        append_row(options.out, {**row, "versions": versions()})
        print(row)


if __name__ == "__main__":
    main()
