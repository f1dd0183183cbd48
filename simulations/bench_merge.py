"""Time `dare-agg merge` against mergekit 0.1.5 on the same synthetic checkpoints.

    python -m simulations.bench_merge --json

Both run as whole commands in one thread, start-up included; what counts is their CPU
seconds. mergekit is installed once into an environment of its own under the cache folder.
Where definitions agree the outputs are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dare_agg.checkpoint import open_checkpoint
from simulations.checkpoints import llama_shapes, make_checkpoints

ROOT = Path(__file__).resolve().parent.parent
MERGEKIT = "mergekit==0.1.5"
WEIGHT = 0.25
DENSITY = 0.1
_TIES = ["--method", "ties", "--option", "sign-tie=positive"]
_DARE = ["--drop-rate", "0.9", "--seed", "1"]

# name -> (mergekit's method, its parameters for each model, global ones, our words, comparable)
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str], bool]] = {
    "linear": ("linear", {}, {}, ["--method", "linear"], True),
    "task-arithmetic": ("task_arithmetic", {}, {}, ["--method", "task-arithmetic"], True),
    "dare-task-arithmetic": (
        "dare_linear", {"density": DENSITY}, {}, ["--method", "task-arithmetic", *_DARE], False,
    ),
    "dare-ties": (
        "dare_ties", {"density": DENSITY}, {},
        [*_TIES, "--option", "trim=0", "--option", "normalize=none", *_DARE], False,
    ),
    "ties": (
        "ties", {"density": DENSITY}, {"normalize": True},
        [*_TIES, "--option", f"density={DENSITY}", "--option", "trim-scope=tensor"], True,
    ),
}  # fmt: skip


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dare-agg"


def mergekit_command(cache: Path) -> Path:
    """Install mergekit into its own environment, once; return its command."""
    home = cache / "mergekit-0.1.5"
    command = home / "bin" / "mergekit-yaml"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(home / "bin" / "pip"), "install", "-q", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, MERGEKIT], check=True)
    return command


def timed(words: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Run a command; return CPU seconds, seconds and peak anonymous MiB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    child = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    peak = [0.0]

    def watch() -> None:
        while child.poll() is None:
            try:
                status = Path(f"/proc/{child.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                if line.startswith("RssAnon:"):
                    peak[0] = max(peak[0], int(line.split()[1]) / 1024)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = child.communicate()
    watcher.join()
    if child.returncode:
        raise SystemExit(f"error: {' '.join(words[:4])} failed: {errors.decode()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - start, peak[0]


def one_thread() -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, **dict.fromkeys(names, "1"), **offline}


def run_mergekit(
    command: Path, method: str, paths: list[Path], dtype: str, out: Path
) -> tuple[float, float, float]:
    name, each, common, _, _ = METHODS[method]
    config: dict[str, Any] = {
        "merge_method": name,
        "models": [
            {"model": str(path), "parameters": {"weight": WEIGHT, **each}} for path in paths[1:]
        ],
        "dtype": dtype,
    }
    if name != "linear":
        config["base_model"] = str(paths[0])
    if common:
        config["parameters"] = common
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    shutil.rmtree(out, ignore_errors=True)
    words = [
        str(command), str(file), str(out), "--random-seed", "1", "--no-copy-tokenizer",
        "--no-write-model-card", "--quiet",
    ]  # fmt: skip
    return timed(words, one_thread())


def run_ours(words: list[str], paths: list[Path], out: Path) -> tuple[float, float, float]:
    weights = ["--weights", ",".join([str(WEIGHT)] * (len(paths) - 1))]
    command = [sys.executable, "-m", "dare_agg.cli.main", "merge", *map(str, paths)]
    return timed([*command, "-o", str(out), "--force", *weights, *words], one_thread())


def compare(ours: Path, theirs: Path) -> dict[str, float]:
    """Largest difference and root mean square difference of two models."""
    a, b = open_checkpoint(ours), open_checkpoint(theirs)
    largest, squares, count = 0.0, 0.0, 0
    for name in a.names:
        gap = np.abs(a.array(name) - b.array(name))
        largest = max(largest, float(gap.max()))
        squares += float((gap.astype(np.float64) ** 2).sum())
        count += gap.size
    return {"largest_difference": largest, "rms_difference": (squares / count) ** 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--layers", type=int, default=16, help="16 make 271 M parameters")
    parser.add_argument("--ours-only", action="store_true", help="leave mergekit out")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    arguments = parser.parse_args()
    work = arguments.cache / "bench-merge"
    work.mkdir(parents=True, exist_ok=True)
    command = None if arguments.ours_only else mergekit_command(arguments.cache)
    shapes = llama_shapes(arguments.layers)
    rows = []
    for dtype in arguments.dtypes:
        paths = make_checkpoints(work / f"{dtype}-{arguments.layers}", 4, dtype, shapes)
        for method in arguments.methods:
            ours_out, theirs_out = work / "ours", work / "theirs"
            ours = [run_ours(METHODS[method][3], paths, ours_out) for _ in range(arguments.repeats)]
            row: dict[str, Any] = {
                "method": method,
                "dtype": dtype,
                "cpu_seconds": round(statistics.median(r[0] for r in ours), 2),
                "seconds": round(statistics.median(r[1] for r in ours), 2),
                "peak_anonymous_mib": round(max(r[2] for r in ours)),
            }
            if command is not None:
                theirs = [
                    run_mergekit(command, method, paths, dtype, theirs_out)
                    for _ in range(arguments.repeats)
                ]
                row["mergekit_cpu_seconds"] = round(statistics.median(r[0] for r in theirs), 2)
                row["mergekit_peak_anonymous_mib"] = round(max(r[2] for r in theirs))
                row["cpu_ratio"] = round(row["mergekit_cpu_seconds"] / row["cpu_seconds"], 2)
                if METHODS[method][4]:
                    row |= compare(ours_out, theirs_out)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    for leftover in ("ours", "theirs"):
        shutil.rmtree(work / leftover, ignore_errors=True)
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
