"""Server time and memory against clients and parameters.

``python -m simulations.bench_scale`` decodes and merges synthetic updates and writes
``results/scale.jsonl``. Each point runs in a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from simulations.run import RESULTS, append_row, read_rows, versions

# (clients, parameters, drop rate)
POINTS = (
    *((n, 1_000_000, "0.99") for n in (10, 100, 1000)),
    *((10, size, "0.99") for size in (10_000_000, 100_000_000)),
    *((10, 100_000_000, rate) for rate in ("0.9", "0.999")),
)
STACK_ELEMENTS = 1 << 25  # clients × tile, so that the engine's working memory stays the same


def measure(clients: int, parameters: int, drop_rate: str) -> dict[str, Any]:
    """Encode updates (untimed), then check, decode and merge them as a server does."""
    from dare_agg.derive import derive_key, seed_secret
    from dare_agg.layout import layout_of
    from dare_agg.mask import parse_drop_rate
    from dare_agg.merge.engine import merge_deltas
    from dare_agg.plan import ModelRef, PlanSettings, make_plans
    from dare_agg.update import decode_update, encode_update

    layout = layout_of({"w": (parameters,)})
    ref = ModelRef("00" * 32, layout.fingerprint, parameters)
    secret = derive_key(seed_secret(0), "round", 1)
    plans = make_plans(secret, 1, [None] * clients, PlanSettings(parse_drop_rate(drop_rate)), ref)
    blobs = [encode_update(plan.spec(), _Waves(parameters)) for plan in plans]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = np.empty(parameters, np.float32)
    began = time.process_time()
    updates = [decode_update(b, p.spec()) for b, p in zip(blobs, plans, strict=True)]
    tile = max(1024, min(1 << 16, STACK_ELEMENTS // clients))
    merge_deltas(
        layout, updates, "task-arithmetic", weights=[1 / clients] * clients, tile=tile, out=out
    )
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    survivors = updates[0].survivors
    assert abs(float(out.mean(dtype=np.float64)) - 1e-3) < 1e-4
    return {
        "clients": clients,
        "parameters": parameters,
        "drop_rate": drop_rate,
        "update_bytes": len(blobs[0]),
        "all_update_bytes": sum(map(len, blobs)),
        "survivors": survivors * clients,
        "server_cpu_seconds": round(seconds, 3),
        "peak_mib": round(peak / 1024),
        "model_mib": round(4 * parameters / 2**20),
        "growth_mib": round((peak - before) / 1024),
    }


class _Waves:
    """A delta made on the fly: 1e-3 with a small ripple, so that no dense vector is held."""

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, lo: int, hi: int, out: np.ndarray) -> None:
        out[:] = np.float32(1e-3)
        out[::2] += np.float32(2e-4)
        out[1::2] -= np.float32(2e-4)


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
