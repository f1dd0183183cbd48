"""Error and accuracy by bytes of every way to send one real delta.

``python -m simulations.bench.rate [--json]`` fine-tunes (or reads from the cache) the tasks of
``scenarios/single.toml``, sends each delta once by every method, and writes
``results/rate.jsonl``. NMSE is ‖restored − δ‖²/‖δ‖².
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.vectors.layout import FloatVector, Layout
from simulations.runs.baselines import COMPRESSORS, Sent, library, stc
from simulations.runs.rows import RESULTS, append_row, read_rows, versions
from simulations.runs.scenario import SCENARIOS, read_scenario

TASKS = ("Reuters R8", "election author")
OURS = tuple(VALUE_FORMATS)
OUR_RATES = ("0", "0.9", "0.99", "0.999")
BETWEEN = ("0.995", "0.998")
KEEPS = (0.1, 0.01)


def one_dimensional_apart(
    vector: FloatVector, rng: np.random.Generator, *, apart: np.ndarray, drop_rate: str, values: str
) -> Sent:
    """1-D tensors (biases, norms) whole in ``values``, the rest by DARE b1."""
    restored = np.empty_like(vector)
    nbytes = 0
    for part, rate, kind in ((~apart, drop_rate, "b1"), (apart, "0", values)):
        restored[part], size = library(vector[part], rng, drop_rate=rate, values=kind)
        nbytes += size
    return restored, nbytes


def methods(layout: Layout) -> Iterator[tuple[str, str, Any]]:
    """Yield (family, setting, compressor)."""
    for values in OURS:
        for rate in OUR_RATES:
            if values == "b1" and rate == "0":
                continue  # that is dense EDEN, listed below
            yield f"DARE {values}", f"p={rate}", partial(library, drop_rate=rate, values=values)
    for rate in BETWEEN:
        yield "DARE b1", f"p={rate}", partial(library, drop_rate=rate, values="b1")
    apart = np.concatenate([np.full(e.size, len(e.shape) == 1) for e in layout.entries])
    for rate in ("0.99", "0.999"):
        for values in ("b1", "f16"):
            yield (
                f"DARE b1, 1-D dense {values}",
                f"p={rate}",
                partial(one_dimensional_apart, apart=apart, drop_rate=rate, values=values),
            )
    yield "QSGD / FedPAQ", "8 bit", COMPRESSORS["fedpaq8"]
    yield "QSGD / FedPAQ", "4 bit", COMPRESSORS["fedpaq4"]
    yield "signSGD", "", COMPRESSORS["signsgd"]
    yield "dense EDEN 1-bit", "", COMPRESSORS["eden1"]
    for keep in (*KEEPS, 0.001, 0.0001):
        yield "top-k f16 + Golomb", f"{keep:g}", partial(COMPRESSORS["topk"], keep=keep)
        yield "STC as published", f"{keep:g}", partial(stc, keep=keep)
        yield "STC corrected", f"{keep:g}", partial(stc, keep=keep, corrected=True)
    for keep in KEEPS:
        yield "random-k f32", f"{keep:g}", partial(COMPRESSORS["randk"], keep=keep)


def measure(delta: np.ndarray, sent: Sent) -> dict[str, float]:
    """NMSE, the same after the best single factor, and bits a parameter."""
    restored, nbytes = sent
    energy = aligned = 0.0
    error = power = 0.0
    for lo in range(0, delta.size, 1 << 18):
        x = delta[lo : lo + (1 << 18)].astype(np.float64)
        y = restored[lo : lo + (1 << 18)].astype(np.float64)
        energy += x @ x
        power += y @ y
        aligned += x @ y
        error += (x - y) @ (x - y)
    return {
        "bytes": nbytes,
        "bits_per_parameter": 8 * nbytes / delta.size,
        "nmse": error / energy,
        # The direction alone: what remains when a server may choose the step's length.
        "nmse_best_scale": 1 - aligned**2 / (energy * power) if power else 1.0,
    }


def run(out: Path, accuracy: bool, tasks: tuple[str, ...] = TASKS) -> list[dict[str, Any]]:
    """Measure what is missing of the results file; returns all rows."""
    from simulations.runs.single import body_layout, tuned_state

    scenario = read_scenario(SCENARIOS / "single.toml")
    done = {(r["task"], r["method"], r["setting"]) for r in read_rows(out)}
    for name in tasks:
        task, base, tuned = tuned_state(scenario.cells[name]["task"])
        layout = body_layout(base)
        start = layout.flatten(base)
        delta = layout.flatten(tuned) - start
        heads = {n: a for n, a in tuned.items() if n not in layout}
        for family, setting, compress in methods(layout):
            if (name, family, setting) in done:
                continue
            began = time.process_time()
            sent = compress(delta, np.random.default_rng(np.random.SeedSequence([1, 60])))
            row: dict[str, Any] = {
                "task": name,
                "method": family,
                "setting": setting,
                "parameters": delta.size,
                **measure(delta, sent),
                "codec_cpu_seconds": round(time.process_time() - began, 2),
            }
            if accuracy:
                state = {**layout.unflatten(start + sent[0]), **heads}
                row["accuracy"] = round(task.evaluate(state)["accuracy"], 4)
            append_row(out, {**row, "versions": versions()})
    return read_rows(out)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.rate", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON object")
    parser.add_argument("--task", choices=TASKS, help="this one only; default: all that lack")
    parser.add_argument("--no-accuracy", action="store_true", help="errors only")
    parser.add_argument("--out", type=Path, default=RESULTS / "rate.jsonl")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tasks = (options.task,) if options.task else TASKS
    rows = run(options.out, not options.no_accuracy, tasks)
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    for row in sorted(rows, key=lambda r: (r["task"], r["bits_per_parameter"])):
        print(
            f"{row['task']:18} {row['method']:20} {row['setting']:8} "
            f"{row['bits_per_parameter']:9.4f} bit  NMSE {row['nmse']:9.3f}  "
            f"accuracy {row.get('accuracy', float('nan')):.3f}"
        )


if __name__ == "__main__":
    main()
