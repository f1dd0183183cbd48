"""The runner: ``python -m simulations.run SCENARIO.toml``.

Writes one JSON line a (cell, seed) to ``simulations/results/<scenario>.jsonl``; a run that
was cut off goes on where it stopped, since rows that are there already are skipped.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
import time
import tomllib
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from simulations.runs.rows import RESULTS, append_row, read_rows, versions
from simulations.runs.scenario import KINDS, Row, read_scenario

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_row(row: Row) -> dict[str, Any]:
    """Run one row in this process; measures its CPU seconds and stamps versions."""
    module = importlib.import_module(KINDS[row.kind][0])
    cpu, wall = time.process_time(), time.monotonic()
    result = module.run_row(row)
    return {
        "scenario": row.scenario,
        "cell": row.cell,
        "seed": row.seed,
        "key": row.key,
        **result,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "wall_seconds": round(time.monotonic() - wall, 1),
        "settings": dict(row.settings),
        "versions": versions(),
    }


def run_scenario(
    path: Path,
    out: Path | None,
    workers: int,
    limit: int,
    only: str,
    task: Mapping[str, Any] | None = None,
) -> int:
    """Run what is missing of a scenario; returns the number of rows that failed.

    ``task`` replaces settings of every cell's task, such as the model.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    scenario = read_scenario(path, task or {})
    target = out or RESULTS / f"{scenario.name}.jsonl"
    done = {row["key"] for row in read_rows(target)}
    rows = list(scenario.rows())
    # The same run may serve two scenarios: it is copied, not repeated.
    made = {
        row["key"]: row
        for other in RESULTS.glob("*.jsonl")
        for row in read_rows(other)
        if "key" in row
    }
    for row in rows:
        if row.key in made and row.key not in done:
            append_row(target, {**made[row.key], "scenario": row.scenario, "cell": row.cell})
            done.add(row.key)
    missing = [row for row in rows if row.key not in done and (not only or only in row.cell)]
    missing = missing[:limit] if limit else missing
    console = Console(stderr=True)
    console.print(f"{scenario.name}: {len(rows)} rows, {len(missing)} to run → {target}")
    failed = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(scenario.name, total=len(missing))

        def finish(row: Row, outcome: dict[str, Any] | Exception) -> int:
            progress.advance(bar)
            if isinstance(outcome, Exception):
                console.print(f"[red]{row.cell} seed {row.seed}: {outcome!r}[/red]")
                return 1
            append_row(target, outcome)
            shown = {k: outcome[k] for k in ("accuracy", "cpu_seconds") if k in outcome}
            console.print(f"{row.cell} seed {row.seed}: {shown}")
            return 0

        if workers == 1:
            for row in missing:
                try:
                    failed += finish(row, run_row(row))
                except Exception as error:
                    failed += finish(row, error)
            return failed
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context) as pool:
            running: dict[Future, Row] = {}
            waiting = list(reversed(missing))
            while waiting or running:
                while waiting and len(running) < workers:
                    row = waiting.pop()
                    running[pool.submit(run_row, row)] = row
                ready, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    row = running.pop(future)
                    error = future.exception()
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    failed += finish(row, error or future.result())
    return failed


def _setting(pair: str) -> tuple[str, Any]:
    """Split KEY=VALUE; the value is TOML, anything else is text."""
    key, _, value = pair.partition("=")
    try:
        return key, tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return key, value


def main() -> int:
    """Entry point; exit status 1 when a row failed."""
    from dare_agg.errors import DareError

    parser = argparse.ArgumentParser(prog="python -m simulations.run", description=__doc__)
    parser.add_argument("scenario", type=Path, nargs="+", help="TOML file(s)")
    parser.add_argument("--out", type=Path, default=None, help="results file (JSON lines)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--limit", type=int, default=0, help="run at most so many rows")
    parser.add_argument("--only", default="", help="only cells whose name holds this text")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[],
        help="a setting of every cell's task, such as model=NAME; needs --out",
    )  # fmt: skip
    options = parser.parse_args()
    if options.set and not options.out:
        parser.error("--set makes other rows than the scenario's; name their file with --out")
    for variable in THREAD_VARIABLES:
        os.environ[variable] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if hasattr(os, "nice"):
        os.nice(10)
    task = dict(_setting(pair) for pair in options.set)
    try:
        failed = sum(
            run_scenario(path, options.out, options.workers, options.limit, options.only, task)
            for path in options.scenario
        )
    except DareError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
