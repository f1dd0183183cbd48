"""`dare-agg run`: the Flower app, with the run's true exit status."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from dare_agg.cli.app_check import ask_outlook
from dare_agg.cli.execute import execute
from dare_agg.cli.prepare import CLIENTS, Prepared, prepare
from dare_agg.cli.run_config import run_settings
from dare_agg.cli.run_words import complete_config
from dare_agg.cli.watch import PORT, watched
from dare_agg.errors import ConfigError
from dare_agg.runs.claim import LOG_FILE, run_state


def run(
    app: Annotated[
        Path | None, typer.Argument(help="Folder of the Flower app [default: this checkout].")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            "-c",
            "--run-config",
            help="Run config as key=value, or a TOML file; may be repeated.",
            autocompletion=complete_config,
        ),
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(
            help=f"Simulated clients [default: {CLIENTS}, or those of the resumed run].", min=1
        ),
    ] = None,
    cpus: Annotated[
        int, typer.Option(help="CPUs a simulated client takes; fewer run side by side.", min=1)
    ] = 1,
    gpus: Annotated[
        float,
        typer.Option(help="GPUs a simulated client takes, such as 0.5: two clients share one."),
    ] = 0.0,
    federation: Annotated[
        str, typer.Option(help="Address of a running SuperLink (host:port); none: simulate here.")
    ] = "",
    root_certificates: Annotated[
        Path | None, typer.Option(help="CA certificate of that SuperLink.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Run folder to go on with, with that run's own config.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Start nothing: show rows, bytes, memory and time, checked."
        ),
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the run on a page of 127.0.0.1 while it goes.")
    ] = False,
    watch_port: Annotated[
        int,
        typer.Option(help="Port of that page; 0: any that is free.", min=0, max=65535),
    ] = PORT,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run the Flower app (simulation or deployment); exit with the run's true status."""
    from dare_agg.cli.ending import failure, note_failure
    from dare_agg.cli.output import fitted, print_json, stderr_console, stdout_console
    from dare_agg.cli.progress import (
        following,
        load_rows,
        missed_lines,
        missed_table,
        secure_lines,
        summary_table,
        task_tables,
    )
    from dare_agg.errors import RunError

    folder = Path(os.path.abspath(resume or output or _new_folder()))
    if resume and output and Path(os.path.abspath(output)) != folder:
        raise ConfigError(f"--output {output} beside --resume {resume}: a run goes on where it is")
    overrides = run_settings(config or [], deployed=bool(federation), resume=resume)
    where: dict[str, Any] = {
        "app": app, "clients": clients, "cpus": cpus, "gpus": gpus, "federation": federation,
        "root_certificates": root_certificates,
    }  # fmt: skip
    if dry_run:
        _show_dry_run(prepare(folder, overrides, **where), cpus, json_)
        return
    log = folder / LOG_FILE
    before = run_state(folder)
    console = stderr_console()
    try:
        with (
            watched(folder, watch_port, console) if watch else nullcontext(),
            following(folder, console) as on_line,
        ):
            status = execute(folder, overrides, watch=on_line, **where)
    except RunError as error:
        raise RunError(f"{error}; log: {log}") from error
    if not status.ok:
        why = failure(status.detail or status.status, run_state(folder), before, log)
        note_failure(folder, status.status, status.detail)
        raise RunError(f"run {status.run_id} failed: {why}; log: {log}")
    rows = load_rows(folder)
    if json_:
        said = [row.values for row in rows]
        print_json({"run": str(folder), "status": status.status, "rows": said})
    else:
        console = stdout_console()
        console.print(fitted(summary_table(rows), console))
        for table in task_tables(rows):
            stdout_console().print(table)
        if (missed := missed_table(rows)) is not None:
            stdout_console().print(missed)
        for line in [*missed_lines(rows), *secure_lines(rows, folder)]:
            stdout_console().print(line)
        console.print(f"Run folder: {folder}\nNext: dare-agg report {folder}", soft_wrap=True)


def _new_folder() -> Path:
    """A folder for a run that names none, by the time of day."""
    name = time.strftime("%Y%m%d-%H%M%S")
    names = (Path("runs") / f"{name}{more}" for more in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(folder for folder in names if not folder.exists())


def _show_dry_run(ready: Prepared, cpus: int, as_json: bool) -> None:
    """Print what a run would do. Raises `ConfigError` where the app does not tell."""
    from dare_agg.cli.outlook import show_outlook
    from dare_agg.cli.output import print_json, stderr_console, stdout_console

    here = not ready.connection
    with stderr_console().status("dividing rows and timing two steps" if here else "looking"):
        found = ask_outlook(ready.app, ready.settings, here=here)
    if not found:
        raise ConfigError(f"the app in {ready.app} does not tell what a run would do: no outlook")
    if as_json:
        print_json(found)
        return
    show_outlook(found, {**ready.usual, **ready.settings}, cpus, stdout_console())
    stdout_console().print("Nothing was started: the same words without --dry-run start it")
