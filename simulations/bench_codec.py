"""Time encoding and decoding against one subtraction of the model.

    python -m simulations.bench_codec --parameters 1e8 --json

One thread, float32. The dense subtraction ``tuned − base`` into a given array is timed beside
every row, so that a busy machine slows both; ratios are of the least CPU seconds. Encoding
starts from base and tuned in memory; decoding checks the update and adds it to a vector.
``extra_mib`` is the largest growth of the resident size during either, beyond the update.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.layout import FloatVector
from dare_agg.mask import parse_drop_rate
from dare_agg.update import UpdateSpec, decode_update, encode_update

VALUES = ("b1", "f16")
DROP_RATES = ("0.9", "0.99", "0.999")
_PAGE = 4096


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def growth_mib(work: Callable[[], Any], besides: int) -> float:
    """Largest growth of the resident size while ``work`` runs, less ``besides`` bytes."""
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
        peak = max(peak, resident())
    finally:
        done.set()
        watcher.join()
    return max(0.0, (peak - before - besides) / 2**20)


def models(parameters: int) -> tuple[FloatVector, FloatVector]:
    """A base and a tuned model, filled block by block."""
    rng = np.random.default_rng(0)
    base, tuned = (np.empty(parameters, np.float32) for _ in range(2))
    block = rng.standard_normal(1 << 20, dtype=np.float32)
    for lo in range(0, parameters, block.size):
        piece = base[lo : lo + block.size]
        piece[:] = block[: piece.size]
        np.multiply(piece, np.float32(1.001), out=tuned[lo : lo + block.size])
    return base, tuned


def measure(
    values: str, drop_rate: str, base: FloatVector, tuned: FloatVector, out: FloatVector, runs: int
) -> dict[str, Any]:
    """One row: ratios to the dense subtraction, and extra memory."""
    spec = UpdateSpec(
        base.size, parse_drop_rate(drop_rate), "stratified", b"m" * 16, b"v" * 16, 3, values,
        "0" * 64, "1" * 64,
    )  # fmt: skip
    blob = b""

    def encode() -> None:
        nonlocal blob
        blob = encode_update(spec, (base, tuned))

    def decode() -> None:
        decode_update(blob, spec).add(0, out.size, out, 0.5)

    def subtract() -> None:
        np.subtract(tuned, base, out=out)

    encode()
    # The update itself is there twice for a moment: as a buffer and as bytes.
    extra = max(growth_mib(encode, 2 * len(blob)), growth_mib(decode, 0))
    times: dict[str, list[float]] = {"subtract": [], "encode": [], "decode": []}
    for _ in range(runs):
        times["subtract"].append(cpu_seconds(subtract))
        times["encode"].append(cpu_seconds(encode))
        times["decode"].append(cpu_seconds(decode))
    least = {name: min(found) for name, found in times.items()}
    return {
        "values": values,
        "drop_rate": float(drop_rate),
        "encode_ratio": round(least["encode"] / least["subtract"], 3),
        "decode_ratio": round(least["decode"] / least["subtract"], 3),
        "extra_mib": round(extra, 1),
        "bits_per_parameter": round(8 * (len(blob) - 120) / base.size, 5),
        "subtract_ns": round(least["subtract"] / base.size * 1e9, 3),
        "encode_ns": round(least["encode"] / base.size * 1e9, 3),
        "decode_ns": round(least["decode"] / base.size * 1e9, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parameters", type=float, default=1e8)
    parser.add_argument("--values", default=",".join(VALUES), help="formats, by comma")
    parser.add_argument("--drop-rates", default=",".join(DROP_RATES), help="by comma")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    parameters = int(words.parameters)
    base, tuned = models(parameters)
    out = np.full(parameters, 0, np.float32)  # its pages exist before the first row
    rows = [
        measure(values, drop_rate, base, tuned, out, words.runs)
        for values in words.values.split(",")
        for drop_rate in words.drop_rates.split(",")
    ]
    if words.json:
        print(json.dumps({"parameters": parameters, "rows": rows}))
        return
    print(f"{parameters:,} parameters, one thread; ratios to tuned - base")
    print("values    p       encode  decode  extra MiB  bits/parameter")
    for row in rows:
        print(
            f"{row['values']:8s} {row['drop_rate']:6g} {row['encode_ratio']:8.2f} "
            f"{row['decode_ratio']:7.2f} {row['extra_mib']:9.1f} {row['bits_per_parameter']:12.5f}"
        )


if __name__ == "__main__":
    main()
