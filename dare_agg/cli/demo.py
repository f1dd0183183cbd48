"""`dare-agg demo`: one real federated fine-tuning, dense and compact, side by side."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dare_agg.cli import signals
from dare_agg.errors import ConfigError, RunError

if TYPE_CHECKING:
    from dare_agg.runs.report import RunRecord

POLL_SECONDS = 0.5
# The control first: it is quick, so that something is seen soon.
METHODS = ("head-only", "fedavg", "dare-task-arithmetic", "dare-ties")
# Small enough for two cores, real enough to need the encoder: head only stays far below.
SETTINGS: Mapping[str, Any] = {
    "methods": ",".join(METHODS),
    "data": "reuters-r8",
    "partition": "dirichlet",
    "alpha": 0.5,
    "drop-rate": "0.9",
    "values": "b1",
    "length": 16,
    "batch": 16,
    "steps": 4,
    "learning-rate": 4e-4,
    "head-learning-rate": 1e-3,
    "test-rows": 600,
}


def run_command(output: Path, settings: Mapping[str, Any], clients: int) -> tuple[str, ...]:
    """The `dare-agg run` command of the demo."""
    words = [sys.executable, "-m", "dare_agg.cli.main", "run"]
    words += ["--output", str(output), "--clients", str(clients)]
    for key, value in settings.items():
        shown = f'"{value}"' if isinstance(value, str) else value
        words += ["--config", f"{key}={shown}"]
    return tuple(words)


def fast_precision() -> str:
    """ "bfloat16" where the processor multiplies it natively, else "float32"."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the run and the report.")
    ] = Path("dare-agg-demo"),
    rounds: Annotated[int, typer.Option(min=1, help="Federated rounds of each method.")] = 3,
    clients: Annotated[int, typer.Option(min=2, help="Simulated clients.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, batches and masks.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fine-tune a real encoder over simulated clients: FedAvg beside DARE, with a report."""
    from dare_agg.cli.output import print_json, stdout_console
    from dare_agg.runs.report import read_run, write_report

    output = output.resolve()
    run_folder = output / "run"
    own = {"seed": seed, "num-rounds": rounds, "precision": fast_precision()}
    started = time.monotonic()
    follow(run_folder, run_command(run_folder, {**SETTINGS, **own}, clients), rounds)
    runs = read_run(run_folder, histograms=True)
    report = write_report(
        output / "report.html",
        runs,
        title=f"{clients} clients fine-tune one encoder",
        lead=(
            f"News topics (Reuters R8) on the 22.7-million-parameter MiniLM encoder: {clients} "
            f"clients with different label mixtures (Dirichlet 0.5), {rounds} rounds through "
            "Flower on this machine, the same data and seeds for every row. FedAvg sends the "
            "whole model; DARE sends one random tenth of the change, one bit a value."
        ),
        command=f"dare-agg demo --rounds {rounds} --clients {clients} --seed {seed}",
    )
    if json:
        print_json({"runs": [json_row(run) for run in runs], "report": str(report)})
        return
    console = stdout_console()
    console.print(result_table(runs))
    console.print(f"Report: {report}   ({time.monotonic() - started:.0f} s in all)")
    console.print("Next: dare-agg run --help   (your own model and data)")


def json_row(run: RunRecord) -> dict[str, Any]:
    """One run as `--json` prints it; bytes count everything, the dense head included."""
    return {
        "method": run.method,
        "accuracy": run.accuracy,
        "rounds": len(run.rounds),
        "clients": run.clients,
        "upload_bytes_per_client_round": round(run.upload + run.head_upload),
        "download_bytes_per_client_round": round(run.download),
        "seconds": round(run.seconds, 1),
    }


def result_table(runs: list[RunRecord]) -> Any:
    """The closing table, for people."""
    from rich.table import Table

    from dare_agg.runs.report import COLUMNS, table_row

    table = Table(title="Federated fine-tuning, equal rounds, data and seeds")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if index else "left")
    for run in runs:
        table.add_row(run.name, *table_row(run))
    return table


def follow(folder: Path, command: tuple[str, ...], rounds: int) -> None:
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
            for name in METHODS
        }
        progress.start_task(bars[METHODS[0]])
        progress.update(bars[METHODS[0]], state="starting Flower")
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
    from dare_agg.runs.rows import read_rows
    from dare_agg.runs.words import human_bytes

    latest = {row.method: row for row in read_rows(metrics)}
    for place, name in enumerate(METHODS):
        row = latest.get(name)
        if row is None:
            continue
        progress.start_task(bars[name])
        sent = human_bytes(row.upload_bytes_per_client)
        seen = f"accuracy {row.accuracy:.3f}, " if row.accuracy is not None else ""
        progress.update(bars[name], completed=row.round, state=f"{seen}{sent} up a client")
        if row.round >= rounds:
            progress.stop_task(bars[name])
            if place + 1 < len(METHODS):
                progress.start_task(bars[METHODS[place + 1]])


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
