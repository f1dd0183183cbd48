"""Following the run of a demo: live progress from its metrics, and its end whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dare_agg.cli import signals
from dare_agg.errors import ConfigError, RunError

POLL_SECONDS = 0.5


def follow(
    folder: Path,
    command: tuple[str, ...],
    rounds: int,
    methods: Sequence[str],
) -> None:
    """Run ``command`` to its end under a live progress read from the run's metrics file.

    Raises `RunError` with the run's own last line when it failed. Whatever ends this
    process also ends the run.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    from dare_agg.cli.output import stderr_console
    from dare_agg.runs.report import TITLES
    from dare_agg.runs.rows import METRICS_FILE

    prepare_folder(folder)
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    metrics, log = folder / METRICS_FILE, folder.with_name("run.log")
    with Progress(*columns, console=stderr_console()) as progress, log.open("wb") as file:
        bars = {
            name: progress.add_task(TITLES[name], total=rounds, state="", start=False)
            for name in methods
        }
        progress.start_task(bars[methods[0]])
        progress.update(bars[methods[0]], state="starting Flower")
        # Ray starts its workers with the lowest priority; here they are all there is to do.
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "RAY_worker_niceness": "0"},
        )
        seen = -1
        # A second Ctrl-C here is a second one there.
        with signals.ending(lambda: os.killpg(process.pid, signal.SIGINT), ""), stopped(process):
            while True:
                ended = process.poll() is not None
                size = metrics.stat().st_size if metrics.is_file() else -1
                if size > seen:
                    seen = size
                    show_progress(progress, bars, metrics, rounds)
                if ended:
                    break
                time.sleep(POLL_SECONDS)
    if process.returncode != 0:
        raise RunError(
            f"the run ended with status {process.returncode}: {last_error(log)}; the whole log is "
            f"{log}"
        )


def show_progress(progress: Any, bars: Mapping[str, Any], metrics: Path, rounds: int) -> None:
    """Bring the bars up to what the metrics file says."""
    from dare_agg.cli.progress import measured
    from dare_agg.runs.rows import read_rows
    from dare_agg.runs.words import human_bytes

    latest = {row.method: row for row in read_rows(metrics)}
    methods = tuple(bars)
    for place, name in enumerate(methods):
        row = latest.get(name)
        if row is None:
            continue
        progress.start_task(bars[name])
        sent = human_bytes(row.upload_bytes_per_client)
        seen = measured(row)
        state = f"{seen}, {sent} up a client" if seen else f"{sent} up a client"
        progress.update(bars[name], completed=row.round, state=state)
        if row.round >= rounds:
            progress.stop_task(bars[name])
            if place + 1 < len(methods):
                progress.start_task(bars[methods[place + 1]])


@contextlib.contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """`stop` the process in the end, whatever ends the body."""
    try:
        yield
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a run that this process started: politely, then not."""
    # The first signal lets the run stop Flower and Ray, which takes a while.
    for number, patience in ((signal.SIGINT, 90), (signal.SIGKILL, 15)):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def prepare_folder(folder: Path) -> None:
    """Make an empty run folder; an older run of the demo there is removed, nothing else."""
    import shutil

    from dare_agg.runs.claim import is_claimed
    from dare_agg.runs.rows import METRICS_FILE

    if is_claimed(folder):
        raise ConfigError(f"a run is at work in {folder}; wait for it, or choose another --output")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / METRICS_FILE).is_file():
            raise ConfigError(f"{folder} is not empty and no earlier run; choose another --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def last_error(log: Path) -> str:
    """The last line of a log that speaks of an error, else its last line."""
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output"])[-1][:300]
