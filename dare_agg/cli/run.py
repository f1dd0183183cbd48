"""`dare-agg run`: the Flower app, with the run's true exit status."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer


def run(
    app: Annotated[
        Path | None, typer.Argument(help="Folder of the Flower app [default: this checkout].")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", "-c", help="Run config as key=value; may be repeated."),
    ] = None,
    clients: Annotated[int, typer.Option(help="Simulated clients.", min=1)] = 10,
    cpus: Annotated[
        int, typer.Option(help="CPUs a simulated client takes; fewer run side by side.", min=1)
    ] = 1,
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
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run the Flower app (simulation or deployment); exit with the run's true status."""
    from dare_agg.cli.ending import note_failure
    from dare_agg.cli.output import print_json, stderr_console, stdout_console
    from dare_agg.cli.progress import (
        follow,
        load_rows,
        missed_lines,
        secure_lines,
        summary_table,
    )
    from dare_agg.errors import RunError

    folder = (output or Path("runs") / time.strftime("%Y%m%d-%H%M%S")).absolute()
    if resume is not None:
        folder = resume.absolute()
    overrides = run_settings(config or [], deployed=bool(federation), resume=resume)
    status = execute(
        folder,
        overrides,
        app=app,
        clients=clients,
        cpus=cpus,
        federation=federation,
        root_certificates=root_certificates,
        watch=follow(folder, stderr_console()),
    )
    if not status.ok:
        note_failure(folder, status.status, status.detail)
        raise RunError(
            f"run {status.run_id} ended as {status.status}: {status.detail}; see {folder}"
        )
    rows = load_rows(folder)
    if json_:
        said = [row.values for row in rows]
        print_json({"run": str(folder), "status": status.status, "rows": said})
    else:
        stdout_console().print(summary_table(rows))
        for line in [*missed_lines(rows), *secure_lines(rows, folder)]:
            stdout_console().print(line)
        stdout_console().print(f"Run folder: {folder}\nNext: dare-agg report {folder}")


def run_settings(
    pairs: list[str], *, deployed: bool, resume: Path | None
) -> dict[str, bool | int | float | str]:
    """Return the run config that differs from the app's: given, resumed, or by default."""
    given = parse_overrides(pairs)
    if resume is not None:
        return {**resumed_config(resume.absolute()), **given, "resume": True}
    if deployed:
        # Over a real network the model travels once, then only small steps.
        given.setdefault("downlink", "full" if given.get("secure-merge") else "auto")
    return given


def resumed_config(folder: Path) -> dict[str, bool | int | float | str]:
    """Return the config a run was started with, as its run.json keeps it."""
    from dare_agg.errors import StateError
    from dare_agg.files.json_text import read_json
    from dare_agg.runs.rows import STATE_FILE

    try:
        stored = read_json(folder / STATE_FILE)["config"]
    except (OSError, ValueError, KeyError) as error:
        raise StateError(
            f"{folder} holds no run to resume ({type(error).__name__}: {error}); give the folder "
            "that dare-agg run --output named"
        ) from error
    return {
        key: ",".join(value) if isinstance(value, list) else value
        for key, value in stored.items()
        if key not in ("output", "resume")
    }


def parse_overrides(pairs: list[str]) -> dict[str, bool | int | float | str]:
    """Read ``key=value`` words; values are TOML, anything else is text."""
    import tomllib

    from dare_agg.errors import ConfigError

    overrides: dict[str, bool | int | float | str] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ConfigError(f"--config {pair!r}; key=value is needed, for example num-rounds=3")
        try:
            overrides[key] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            overrides[key] = value
    return overrides


def absolute_paths(settings: dict[str, bool | int | float | str]) -> None:
    """Make files and folders named from here absolute: Flower's processes run elsewhere.

    A word that names nothing here (a built-in data set, a hub's name) stays as it is.
    """
    from dare_agg.checkpoint.hub import located

    for key in ("data", "model", "initial", "identities", "secure-models"):
        words = str(settings.get(key, "")).split(",")
        found = [
            str(located(Path(word.strip()).absolute()))
            if word.strip() and Path(word.strip()).exists()
            else word
            for word in words
        ]
        if found != words:
            settings[key] = ",".join(found)


def refuse_quantised_models(settings: Mapping[str, bool | int | float | str]) -> None:
    """Raise `QuantisedError` before anything starts where a folder or file named is quantised."""
    from dare_agg.checkpoint import refuse_quantised
    from dare_agg.checkpoint.hub import in_cache

    for key in ("model", "initial"):
        word = str(settings.get(key, ""))
        path = in_cache(word) or Path(word)
        if word and (path.is_dir() or path.suffix == ".safetensors"):
            refuse_quantised(path)


def practice(folder: Path, clients: int, settings: dict) -> str:
    """Give simulated clients keys of their own; returns the roster's path."""
    import os

    from dare_agg.secure.practice import practice_consortium

    models = [word.strip() for word in str(settings.get("secure-models", "")).split(",")]
    os.environ.update(practice_consortium(folder, clients, [word for word in models if word]))
    return str(folder / "roster.json")


def execute(folder, overrides, *, app=None, clients=10, cpus=1, federation="",  # type: ignore[no-untyped-def]
            root_certificates=None, watch=None):  # fmt: skip
    """Run the app into ``folder``; returns its `RunStatus`. See `run` for the words."""
    from dare_agg.cli.ending import ended_whole
    from dare_agg.errors import ConfigError
    from dare_agg.flower.processes import launch

    source = launch.find_app(app)
    refuse_quantised_models(overrides)
    home = folder / "flower"
    home.mkdir(parents=True, exist_ok=True)
    settings = {"output": str(folder), **overrides}
    # A checked config fails here, before any process starts; the server checks it again.
    log = (folder / "run.log").open("a", encoding="utf-8")

    def on_line(line: str) -> None:
        if line:
            log.write(line + "\n")
            log.flush()
        # A terminal may be gone; whoever closed it also sent a signal, if the run shall end.
        with contextlib.suppress(OSError):
            if watch is not None:
                watch(line)

    with log, ended_whole(folder, home, settings):
        if federation:
            connection = {"address": federation}
            if root_certificates is not None:
                connection["root-certificates"] = str(root_certificates.absolute())
            elif federation.split(":")[0] in ("127.0.0.1", "localhost"):
                connection["insecure"] = True
            else:
                raise ConfigError(
                    f"federation {federation!r} without --root-certificates; plain text is for "
                    "loopback only: make certificates with dare-agg certs"
                )
            launch.write_connection(home, "run", connection)
            return launch.run_app(source, home, "run", settings, on_line=on_line)
        absolute_paths(settings)
        if settings.get("secure"):
            settings["secure-roster"] = practice(folder / "keys", clients, settings)
        with launch.simulation_superlink(home) as simulation:
            launch.write_connection(home, "run", {"address": simulation.address, "insecure": True})
            settings.setdefault("min-clients", clients)
            return launch.run_app(
                source,
                home,
                "run",
                settings,
                federation_config={"num-supernodes": clients, "client-resources-num-cpus": cpus},
                on_line=on_line,
                simulation=simulation,
            )
