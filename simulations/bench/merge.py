"""Time `dare-agg merge` against mergekit 0.1.5 on the same synthetic checkpoints.

    python -m simulations.bench.merge --json               # mergekit's CPU seconds ÷ ours
    python -m simulations.bench.merge --updates --json     # ten updates against ten checkpoints
    python -m simulations.bench.merge --memory --json      # 2 to 32 models, 2 GB and 6 GB
    python -m simulations.bench.merge --matrices --json    # methods that see Linears as matrices

All run as whole commands in one thread, start-up included; what counts is their CPU seconds
(medians of ``--repeats`` runs of ours and ``--mergekit-repeats`` of mergekit's, which take
minutes). mergekit is installed once into an environment of its own under the cache folder
(``DARE_AGG_CACHE``, default ~/.cache/dare-agg), or ``--mergekit`` names its mergekit-yaml.
The checkpoints (8 GB for both dtypes) stay in the cache folder for the next run;
``--layers 2`` makes small ones (145 M parameters). Where definitions agree the outputs are
compared: ``differing`` is the share of elements that differ by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dare_agg.checkpoint import open_checkpoint
from dare_agg.files.cache import cache_folder
from simulations.runs.checkpoints import llama_shapes, make_checkpoints
from simulations.runs.memory import run_watched

ROOT = Path(__file__).parents[2]
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


def mergekit_command(cache: Path) -> Path:
    """Install mergekit into its own environment, once; return its command."""
    home = cache / "mergekit-0.1.5"
    command, complete = home / "bin" / "mergekit-yaml", home / ".complete"
    if command.exists() and (complete.exists() or works(command)):
        complete.touch()
        return command
    print(f"installing {MERGEKIT} into {home} (once; a few minutes)", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    pip = [str(home / "bin" / "pip"), "install", "-q", "-c", str(ROOT / "constraints.txt")]
    try:
        for words in ([sys.executable, "-m", "venv", str(home)], [*pip, MERGEKIT]):
            subprocess.run(words, check=True, capture_output=True, text=True)
        if not works(command):
            raise OSError(f"{command} does not run")
    except (subprocess.CalledProcessError, OSError) as error:
        said = getattr(error, "stderr", "") or str(error)
        shutil.rmtree(home, ignore_errors=True)
        raise SystemExit(
            f"error: {MERGEKIT} cannot be installed: {' '.join(said.split())[-400:]}; make an "
            "environment with it and name its command (--mergekit .../bin/mergekit-yaml), or time "
            "dare-agg alone (--ours-only)"
        ) from error
    complete.touch()
    return command


def works(command: Path) -> bool:
    try:
        done = subprocess.run([str(command), "--help"], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def timed(words: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Run a command; return CPU seconds, seconds and peak anonymous MiB."""
    ran = run_watched(words, environment, ROOT)
    if ran.status:
        raise SystemExit(f"error: {' '.join(words[:4])} failed: {ran.err[-2000:]}")
    return ran.cpu_seconds, ran.seconds, ran.own_mib


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


def run_ours(
    words: list[str], paths: list[Path], out: Path, *, weighted: bool = True
) -> tuple[float, float, float]:
    weights = ["--weights", ",".join([str(WEIGHT)] * (len(paths) - 1))] if weighted else []
    command = [sys.executable, "-m", "dare_agg.cli.main", "merge", *map(str, paths)]
    shutil.rmtree(out, ignore_errors=True)
    return timed([*command, "-o", str(out), *weights, *words], one_thread())


def compare(ours: Path, theirs: Path, dtype: str) -> dict[str, float]:
    """Largest and root mean square difference of two models, and the share that differs."""
    a, b = open_checkpoint(ours), open_checkpoint(theirs)
    unit = {"bfloat16": 2.0**-7, "float32": 2.0**-22}[dtype]
    largest, squares, count, differing = 0.0, 0.0, 0, 0
    for name in a.names:
        left = a.array(name)
        gap = np.abs(left - b.array(name))
        largest = max(largest, float(gap.max()))
        squares += float((gap.astype(np.float64) ** 2).sum())
        differing += int(np.count_nonzero(gap > np.abs(left) * unit + 1e-7))
        count += gap.size
    return {
        "largest_difference": largest,
        "rms_difference": (squares / count) ** 0.5,
        "differing": differing / count,
    }


def speed(
    arguments: argparse.Namespace, work: Path, outputs: Path, command: Path | None
) -> list[dict[str, Any]]:
    """One row a method and dtype."""
    rows = []
    ours_out, theirs_out = outputs / "ours", outputs / "theirs"
    for dtype in arguments.dtypes:
        shapes = llama_shapes(arguments.layers)
        paths = make_checkpoints(work / f"{dtype}-{arguments.layers}", 4, dtype, shapes)
        for method in arguments.methods:
            run_ours(METHODS[method][3], paths, ours_out)  # the files are in the page cache now
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
                    for _ in range(arguments.mergekit_repeats)
                ]
                row["mergekit_cpu_seconds"] = round(statistics.median(r[0] for r in theirs), 2)
                row["mergekit_peak_anonymous_mib"] = round(max(r[2] for r in theirs))
                row["cpu_ratio"] = round(row["mergekit_cpu_seconds"] / row["cpu_seconds"], 2)
                if METHODS[method][4]:
                    row |= compare(ours_out, theirs_out, dtype)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def make_update(base: Path, tuned: Path, out: Path, drop_rate: str) -> Path:
    words = [sys.executable, "-m", "dare_agg.cli.main", "diff", str(base), str(tuned), "--force"]
    words += ["-o", str(out), "--drop-rate", drop_rate, "--values", "f32", "--seed", "1"]
    timed(words, one_thread())
    return out


def updates(arguments: argparse.Namespace, work: Path, outputs: Path) -> list[dict[str, Any]]:
    """Ten updates of p = .99 against the ten checkpoints they come from, same bits out.

    ``floor`` merges one update of next to nothing: what reading the base, writing the result and
    starting cost whatever is merged.
    """
    rows, rate, count = [], "0.99", 10
    for dtype in arguments.dtypes:
        shapes = llama_shapes(arguments.layers)
        base, *tuned = make_checkpoints(work / f"{dtype}-{arguments.layers}", count, dtype, shapes)
        files = [
            make_update(base, path, outputs / f"{dtype}-{number}.dare", rate)
            for number, path in enumerate(tuned)
        ]
        least = make_update(base, tuned[0], outputs / f"{dtype}-least.dare", "0.9999")
        ties = ["--method", "ties", "--option", "trim=0"]
        for method, words in (("task-arithmetic", ["--method", "task-arithmetic"]), ("ties", ties)):
            dare = ["--drop-rate", rate, "--seed", "1"]
            dense = words[:2] if method == "ties" else words
            jobs = {
                "updates": (files, words), "checkpoints": (tuned, [*words, *dare]),
                "checkpoints_whole": (tuned, dense), "floor": ([least], words),
            }  # fmt: skip
            row: dict[str, Any] = {"method": method, "dtype": dtype, "models": count}
            outs = {}
            for name, (models, extra) in jobs.items():
                outs[name] = outputs / name
                runs = [
                    run_ours(extra, [base, *models], outs[name], weighted=False)
                    for _ in range(arguments.repeats + 1)
                ][1:]
                row[f"{name}_cpu_seconds"] = round(statistics.median(r[0] for r in runs), 2)
                row[f"{name}_peak_anonymous_mib"] = round(max(r[2] for r in runs))
            spent = row["updates_cpu_seconds"]
            row["ratio"] = round(row["checkpoints_cpu_seconds"] / spent, 2)
            row["ratio_whole"] = round(row["checkpoints_whole_cpu_seconds"] / spent, 2)
            row["equal"] = all(
                np.array_equal(a.raw(name), b.raw(name))
                for a, b in [
                    (open_checkpoint(outs["updates"]), open_checkpoint(outs["checkpoints"]))
                ]
                for name in a.names
            )
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            for out in outs.values():
                shutil.rmtree(out, ignore_errors=True)
    return rows


def memory(arguments: argparse.Namespace, work: Path, outputs: Path) -> list[dict[str, Any]]:
    """Peak anonymous memory by number of models (59 M parameters), then by their size."""
    dare = ["--drop-rate", "0.9", "--seed", "1"]
    jobs = {
        "task-arithmetic": ["--method", "task-arithmetic"],
        "dare-ties": [*_TIES, "--option", "trim=0", *dare],
        "ties": [*_TIES],
    }
    cells: list[tuple[dict[str, tuple[int, ...]], int, list[int]]] = []
    if arguments.memory != "size":
        cells += [(llama_shapes(4, vocabulary=4000), 32, [2, 4, 8, 16, 32])]
    if arguments.memory != "number":
        # 1.0 and 3.0 thousand million parameters: 2 GB and 6 GB in bfloat16.
        cells += [(llama_shapes(16, 2048, 5632, 32_000), 2, [2])]
        cells += [(llama_shapes(26, 3072, 8448, 32_000), 2, [2])]
    rows = []
    for shapes, made, counts in cells:
        size = sum(int(np.prod(shape)) for shape in shapes.values())
        folder = outputs / f"memory-{size}"
        paths = make_checkpoints(folder, made, "bfloat16", shapes, repeated=True)
        for count in counts:
            row: dict[str, Any] = {"models": count, "gigabytes": round(2 * size / 1e9, 2)}
            for name, words in jobs.items():
                used = run_ours(words, paths[: count + 1], outputs / "ours", weighted=False)
                row[f"{name}_peak_anonymous_mib"] = round(used[2])
                row[f"{name}_cpu_seconds"] = round(used[0], 2)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    return rows


MATRICES = ("wudi", "iso-c", "tsv-m", "knots")


def matrices(arguments: argparse.Namespace, work: Path, outputs: Path) -> list[dict[str, Any]]:
    """Four models by the methods that solve or decompose each Linear, one run each.

    Unlike the others they may use two threads, over tensors.
    """
    rows = []
    shapes = llama_shapes(arguments.layers)
    paths = make_checkpoints(work / f"bfloat16-{arguments.layers}", 4, "bfloat16", shapes)
    for method in arguments.matrices:
        for threads in (1, 2):
            words = ["--method", method, "--threads", str(threads)]
            used = run_ours(words, paths, outputs / "ours")
            row = {
                "method": method,
                "parameters": sum(int(np.prod(shape)) for shape in shapes.values()),
                "threads": threads,
                "cpu_seconds": round(used[0], 1),
                "seconds": round(used[1], 1),
                "peak_anonymous_mib": round(used[2]),
            }
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.merge", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"]
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours for the median")
    parser.add_argument("--mergekit-repeats", type=int, default=1, help="runs of mergekit")
    parser.add_argument("--layers", type=int, default=16, help="16 make 271 M parameters")
    parser.add_argument("--ours-only", action="store_true", help="leave mergekit out")
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of an environment that exists")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--updates", action="store_true", help="ten updates against checkpoints")
    parser.add_argument(
        "--memory",
        nargs="?",
        const="all",
        choices=["all", "number", "size"],
        help="memory by number of models, by their size, or both",
    )
    parser.add_argument(
        "--matrices", nargs="*", choices=MATRICES, help="methods that see Linears as matrices"
    )
    arguments = parser.parse_args()
    if arguments.matrices == []:
        arguments.matrices = list(MATRICES)
    work = arguments.cache / "bench-merge"
    try:
        work.mkdir(parents=True, exist_ok=True)
        # Outputs of its own: another run may be under way.
        outputs = Path(tempfile.mkdtemp(prefix="out-", dir=work))
    except OSError as error:
        raise SystemExit(f"error: {work} cannot be made ({error}); give --cache FOLDER") from error
    try:
        if arguments.updates:
            found = {"updates": updates(arguments, work, outputs)}
        elif arguments.matrices:
            found = {"matrices": matrices(arguments, work, outputs)}
        elif arguments.memory:
            found = {"memory": memory(arguments, work, outputs)}
        else:
            command = arguments.mergekit
            if command is None and not arguments.ours_only:
                command = mergekit_command(arguments.cache)
            elif command is not None and not works(command):
                raise SystemExit(f"error: {command} does not run; name a working mergekit-yaml")
            found = {"rows": speed(arguments, work, outputs, command)}
    finally:
        shutil.rmtree(outputs, ignore_errors=True)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
