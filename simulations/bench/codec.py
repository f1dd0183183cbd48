"""Time encoding and decoding against one subtraction of the model.

    python -m simulations.bench.codec --parameters 1e8 --json

One thread, float32. The dense subtraction ``tuned − base`` into a given array is timed just
before every encoding and decoding, so that a busy machine slows both; a ratio is the median of
CPU seconds over CPU seconds. Encoding starts from base and tuned in memory; decoding checks the
update and adds it to a vector. ``extra_mib`` is the largest growth of the resident size during
either, beyond the update. Loops compiled by numba, where installed, are loaded before the clock
starts; ``--kernel numpy`` leaves them out. ``--threads`` adds elapsed times with so many.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dare_agg.codec.kernels import KERNELS, choose_kernel, kernel_in_use
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.rotation import GROUP
from dare_agg.codec.update import (
    GROUPS_A_THREAD,
    UpdateSpec,
    decode_update,
    encode_update,
    update_bytes,
)
from dare_agg.codec.update_header import HEADER_BYTES
from dare_agg.errors import ConfigError
from dare_agg.vectors.layout import FloatVector
from simulations.runs.looking import Looking

VALUES = ("b1", "f16")
DROP_RATES = ("0.9", "0.99", "0.999")
RATIOS = ("encode_ratio", "decode_ratio", "extra_mib")
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
    before, peak = resident(), 0

    def look() -> None:
        nonlocal peak
        peak = max(peak, resident())

    with Looking(look, 0.002):
        work()
        look()
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


def repeated(work: Callable[[], Any], seconds: float) -> Callable[[], Any]:
    """``work`` as often as takes at least so many CPU seconds (for small vectors)."""
    times = max(1, round(seconds / max(1e-7, cpu_seconds(work))))

    def run() -> None:
        for _ in range(times):
            work()

    run.times = times  # type: ignore[attr-defined]
    return run


class Codec:
    """One value format and drop rate at work on a pair of models."""

    def __init__(self, values: str, drop_rate: str, base: FloatVector, tuned: FloatVector) -> None:
        self.spec = UpdateSpec(
            base.size, parse_drop_rate(drop_rate), "stratified", b"m" * 16, b"v" * 16, 3, values,
            "0" * 64, "1" * 64,
        )  # fmt: skip
        self.models = base, tuned
        self.blob = b""

    def encode(self, threads: int = 1) -> None:
        self.blob = encode_update(self.spec, self.models, threads)

    def decode(self, out: FloatVector, threads: int = 1) -> None:
        update = decode_update(self.blob, self.spec)
        threads = max(1, min(threads, update.survivors // (GROUPS_A_THREAD * GROUP)))
        bounds = [out.size * part // threads for part in range(threads + 1)]

        def add(lo: int, hi: int) -> None:
            update.add(lo, hi, out[lo:hi], 0.5)

        if threads == 1:
            add(0, out.size)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(add, bounds[:-1], bounds[1:]))


def measure(codec: Codec, out: FloatVector, runs: int) -> dict[str, Any]:
    """CPU time a parameter, ratios to the dense subtraction, and extra memory."""
    base, tuned = codec.models

    def subtract() -> None:
        np.subtract(tuned, base, out=out)

    codec.encode()
    codec.blob = b""
    size = update_bytes(codec.spec)
    extra = max(growth_mib(codec.encode, size), growth_mib(lambda: codec.decode(out), 0))
    work = {"encode": codec.encode, "decode": lambda: codec.decode(out)}
    again = {name: repeated(task, 1e-3) for name, task in work.items()}
    dense = repeated(subtract, 1e-3)
    found: dict[str, list[float]] = {"subtract": [], "encode": [], "decode": []}
    ratios: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(runs):
        for name, task in again.items():
            before = cpu_seconds(dense) / dense.times  # type: ignore[attr-defined]
            took = cpu_seconds(task) / task.times  # type: ignore[attr-defined]
            found["subtract"].append(before)
            found[name].append(took)
            ratios[name].append(took / before)
    return {
        "encode_ratio": round(median(ratios["encode"]), 3),
        "decode_ratio": round(median(ratios["decode"]), 3),
        "extra_mib": round(extra, 1),
        "bits_per_parameter": round(8 * (len(codec.blob) - HEADER_BYTES) / base.size, 5),
        **{
            f"{name}_ns": round(median(times) / base.size * 1e9, 3) for name, times in found.items()
        },
    }


def scaling(codec: Codec, out: FloatVector, threads: int, runs: int) -> dict[str, Any]:
    """Least elapsed nanoseconds a parameter with one thread and with several, and busy cores.

    Cores are CPU seconds over elapsed ones, the most of all runs: what the work allows even
    where other processes take part of the machine.
    """
    found: dict[str, Any] = {}
    for name, work in (
        ("encode", codec.encode),
        ("decode", lambda count: codec.decode(out, count)),
    ):
        for count in (1, threads):
            elapsed, cores = float("inf"), 0.0
            for _ in range(runs):
                start, cpu = time.perf_counter(), time.process_time()
                work(count)
                took = time.perf_counter() - start
                elapsed = min(elapsed, took)
                cores = max(cores, (time.process_time() - cpu) / took)
            found[f"{name}_{count}_threads"] = {
                "elapsed_ns": round(elapsed / out.size * 1e9, 3),
                "cores": round(cores, 2),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.codec", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--parameters", type=float, default=1e8)
    parser.add_argument("--values", default=",".join(VALUES), help="formats, by comma")
    parser.add_argument("--drop-rates", default=",".join(DROP_RATES), help="by comma")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="measure so many threads too")
    parser.add_argument("--kernel", choices=KERNELS, default="auto")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    kernel = warm_up(words.kernel)
    parameters = int(words.parameters)
    base, tuned = models(parameters)
    out = np.full(parameters, 0, np.float32)  # its pages exist before the first row
    rows, details = [], []
    for values in words.values.split(","):
        for drop_rate in words.drop_rates.split(","):
            codec = Codec(values, drop_rate, base, tuned)
            found = measure(codec, out, words.runs)
            if words.threads > 1:
                found |= scaling(codec, out, words.threads, words.runs)
            row = {"values": values, "drop_rate": float(drop_rate)}
            rows.append(row | {name: found.pop(name) for name in RATIOS})
            details.append(row | found)
    if words.json:
        print(
            json.dumps(
                {"parameters": parameters, "rows": rows, "kernel": kernel, "details": details}
            )
        )
        return
    print(f"{parameters:,} parameters, {kernel}, one thread; ratios to tuned - base")
    print("values    p       encode  decode  extra MiB  bits/parameter")
    for row, more in zip(rows, details, strict=True):
        print(
            f"{row['values']:8s} {row['drop_rate']:6g} {row['encode_ratio']:8.3f} "
            f"{row['decode_ratio']:7.3f} {row['extra_mib']:9.1f} {more['bits_per_parameter']:12.5f}"
            + "".join(
                f"  {name}: {times['elapsed_ns']} ns, {times['cores']} cores"
                for name, times in more.items()
                if name.endswith("_threads")
            )
        )


def warm_up(kernel: str) -> str:
    """Load what a process comes to use once it has coded for a while; return its name."""
    if kernel == "auto":
        try:
            choose_kernel("numba")
        except ConfigError as error:
            print(f"numpy alone: {error}", file=sys.stderr)
            kernel = "numpy"
    if kernel != "auto":
        choose_kernel(kernel)
    return kernel_in_use()


if __name__ == "__main__":
    main()
