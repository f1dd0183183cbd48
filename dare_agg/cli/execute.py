"""A run of the app: started in a simulation here, or on a SuperLink, and followed to its end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_agg.cli.ending import ended_whole
from dare_agg.cli.prepare import parties_models, prepare
from dare_agg.files.app_config import Scalar
from dare_agg.runs.claim import COMMAND, LOG_FILE, claim, write_simulation
from dare_agg.secure.practice import practice_consortium

if TYPE_CHECKING:
    from dare_agg.flower.processes.launch import RunStatus


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
            groups = {**ready.usual, **settings}.get("secure-groups", 1)
            parties = practice_consortium(
                folder / "keys", ready.simulated, parties_models(settings), int(groups)
            )
            os.environ.update(parties)
        federation_config: dict[str, Scalar] = {
            "num-supernodes": ready.simulated,
            "client-resources-num-cpus": where.get("cpus", 1),
            "client-resources-num-gpus": where.get("gpus", 0.0),
        }
        return _simulated(ready.app, home, settings, federation_config, on_line)


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
