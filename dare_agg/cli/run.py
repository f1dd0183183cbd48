"""`dare-agg run`: the Flower app, with the run's true exit status."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dare_agg.cli.app_check import ask_app, ask_outlook, check_kinds, check_words
from dare_agg.cli.ending import ended_whole
from dare_agg.cli.gpus import check_gpus
from dare_agg.cli.run_config import absolute_paths, as_texts, run_settings
from dare_agg.cli.run_words import complete_config
from dare_agg.cli.watch import PORT, watched
from dare_agg.errors import ConfigError
from dare_agg.files.app_config import Scalar, absent_words, app_defaults, find_app
from dare_agg.runs.claim import (
    COMMAND,
    LOG_FILE,
    check_folder,
    claim,
    read_simulation,
    run_state,
    write_simulation,
)
from dare_agg.secure.practice import check_consortium, practice_consortium

if TYPE_CHECKING:
    from dare_agg.flower.processes.launch import RunStatus

CLIENTS = 10


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
    from dare_agg.cli.output import print_json, stderr_console, stdout_console
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

    folder = (resume or output or _new_folder()).absolute()
    if resume and output and output.absolute() != folder:
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
        stdout_console().print(summary_table(rows))
        for table in task_tables(rows):
            stdout_console().print(table)
        if (missed := missed_table(rows)) is not None:
            stdout_console().print(missed)
        for line in [*missed_lines(rows), *secure_lines(rows, folder)]:
            stdout_console().print(line)
        stdout_console().print(f"Run folder: {folder}\nNext: dare-agg report {folder}")


def _new_folder() -> Path:
    """A folder for a run that names none, by the time of day."""
    name = time.strftime("%Y%m%d-%H%M%S")
    names = (Path("runs") / f"{name}{more}" for more in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(folder for folder in names if not folder.exists())


@dataclass(frozen=True)
class Prepared:
    """A run whose words are settled and checked: nothing is started, no folder touched."""

    app: Path
    settings: dict[str, Scalar]
    usual: Mapping[str, Scalar]
    connection: Mapping[str, Scalar]
    simulated: int


def prepare(
    folder: Path,
    overrides: Mapping[str, Scalar],
    *,
    app: Path | None = None,
    clients: int | None = None,
    cpus: int = 1,
    gpus: float = 0.0,
    federation: str = "",
    root_certificates: Path | None = None,
) -> Prepared:
    """Settle and check all words of a run into ``folder``; raises `DareError` for what is wrong.

    See `run` for the words.
    """
    _need("flwr" if federation else "ray")
    source = find_app(app)
    usual = app_defaults(source)
    overrides = as_texts(overrides, usual)
    check_words(overrides, usual, absent_words(source))
    resume = overrides.get("resume") is True
    if not resume:
        check_folder(folder)
    own: dict[str, Scalar] = {"output": str(folder)}
    settings = dict(overrides)
    connection: dict[str, Scalar] = {}
    simulated = 0
    if federation:
        connection = _connection(federation, root_certificates)
        if gpus:
            raise ConfigError(
                f"--gpus {gpus:g} beside --federation: it is of simulated clients; a SuperNode "
                "sees its machine's GPUs, and takes device in its --node-config"
            )
    else:
        check_gpus(gpus, str({**usual, **settings}.get("device", "auto")))
        simulated = _simulated_clients(folder, clients, resume)
        absolute_paths(settings)
        own["min-clients"] = simulated
        if settings.get("secure"):
            check_consortium(simulated, _models(settings))
            settings["secure-roster"] = str(folder / "keys" / "roster.json")
    # Another app may have no such words.
    settings = {key: value for key, value in own.items() if key in usual} | settings
    if not ask_app(source, settings, here=not federation):
        check_kinds(settings, usual)
    refuse_quantised_models(settings)
    return Prepared(source, settings, usual, connection, simulated)


def execute(
    folder: Path,
    overrides: Mapping[str, Scalar],
    *,
    watch: Callable[[str], None] | None = None,
    **where: Any,
) -> RunStatus:
    """Run the app into ``folder``; returns its `RunStatus`. ``where`` are `prepare`'s words.

    All is checked before the folder is touched and Flower starts: a `DareError` until then
    leaves the folder as it was.
    """
    ready = prepare(folder, overrides, **where)
    settings, resume = ready.settings, overrides.get("resume") is True
    rounds = {**ready.usual, **settings}.get("num-rounds")
    home = folder / "flower"
    with (
        claim(folder, COMMAND, resume=resume, rounds=rounds if type(rounds) is int else 0),
        (folder / LOG_FILE).open("a", encoding="utf-8") as log,
        ended_whole(folder, home, settings),
    ):

        def on_line(line: str) -> None:
            if line:
                log.write(line + "\n")
                log.flush()
            # A terminal may be gone; whoever closed it also sent a signal, if the run shall end.
            with contextlib.suppress(OSError):
                if watch is not None:
                    watch(line)

        if ready.connection:
            return _deployed(ready.app, home, settings, ready.connection, on_line)
        write_simulation(folder, ready.simulated)
        if settings.get("secure"):
            parties = practice_consortium(folder / "keys", ready.simulated, _models(settings))
            os.environ.update(parties)
        federation_config: dict[str, Scalar] = {
            "num-supernodes": ready.simulated,
            "client-resources-num-cpus": where.get("cpus", 1),
            "client-resources-num-gpus": where.get("gpus", 0.0),
        }
        return _simulated(ready.app, home, settings, federation_config, on_line)


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


def _need(package: str) -> None:
    """Raise `ModuleNotFoundError` for what is not installed, without the time of importing it."""
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"no module named {package}", name=package)


def _deployed(
    app: Path,
    home: Path,
    settings: Mapping[str, Scalar],
    connection: Mapping[str, Scalar],
    on_line: Callable[[str], None],
) -> RunStatus:
    from dare_agg.flower.processes import launch

    home.mkdir(exist_ok=True)
    launch.write_connection(home, "run", connection)
    return launch.run_app(app, home, "run", settings, on_line=on_line)


def _simulated(
    app: Path,
    home: Path,
    settings: Mapping[str, Scalar],
    federation_config: Mapping[str, Scalar],
    on_line: Callable[[str], None],
) -> RunStatus:
    from dare_agg.flower.processes import launch

    with launch.simulation_superlink(home) as simulation:
        launch.write_connection(home, "run", {"address": simulation.address, "insecure": True})
        return launch.run_app(
            app,
            home,
            "run",
            settings,
            federation_config=federation_config,
            on_line=on_line,
            simulation=simulation,
        )


def _connection(federation: str, root_certificates: Path | None) -> dict[str, Scalar]:
    """How to reach a SuperLink; raises `ConfigError` for plain text beyond the loopback."""
    if root_certificates is not None:
        if not root_certificates.is_file():
            raise ConfigError(f"--root-certificates: {root_certificates} does not exist")
        return {"address": federation, "root-certificates": str(root_certificates.absolute())}
    if federation.split(":")[0] in ("127.0.0.1", "localhost"):
        return {"address": federation, "insecure": True}
    raise ConfigError(
        f"federation {federation!r} without --root-certificates; plain text is for loopback only: "
        "make certificates with dare-agg certs"
    )


def refuse_quantised_models(settings: Mapping[str, Scalar]) -> None:
    """Raise `QuantisedError` before anything starts where a folder or file named is quantised."""
    from dare_agg.checkpoint import refuse_quantised
    from dare_agg.checkpoint.hub import in_cache

    for key in ("model", "initial", "base"):
        word = str(settings.get(key, ""))
        path = in_cache(word) or Path(word)
        if word and (path.is_dir() or path.suffix == ".safetensors"):
            refuse_quantised(path)


def _models(settings: Mapping[str, Scalar]) -> list[str]:
    """The parties' own models of a secure merge, by partition."""
    words = str(settings.get("secure-models", "")).split(",")
    return [word.strip() for word in words if word.strip()]


def _simulated_clients(folder: Path, clients: int | None, resume: bool) -> int:
    """How many clients a simulation has; a resumed run those it had.

    The data are divided among them: raises `ConfigError` where a resumed run had others.
    """
    had = read_simulation(folder) if resume else None
    if had and clients not in (None, had):
        raise ConfigError(
            f"--clients {clients}: the run in {folder} has {had}, among whom its data are divided; "
            f"leave --clients out, or begin another run: --output"
        )
    return clients or had or CLIENTS
