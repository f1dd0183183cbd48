"""`dare-agg watch`: a run while it goes, as a page on loopback and a line in the terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dare_agg.runs.watch import Watched

# `dare_agg.runs.watch.PORT`, which the help need not import.
PORT = 8650
POLL_SECONDS = 1.0


def watch(
    run: Annotated[
        Path | None, typer.Argument(help="Folder of a run [default: the newest one here].")
    ] = None,
    port: Annotated[
        int,
        typer.Option(help="Port of the page on 127.0.0.1; 0: any that is free.", min=0, max=65535),
    ] = PORT,
) -> None:
    """Follow a run live in a browser, on this machine alone; Ctrl-C ends it, not the run."""
    from dare_agg.cli import signals
    from dare_agg.cli.output import stderr_console
    from dare_agg.errors import StateError
    from dare_agg.runs.live import check_watched, newest_run
    from dare_agg.runs.watch import serve

    folder = run or newest_run(Path.cwd())
    if folder is None:
        raise StateError(
            "no run is in this folder or its runs/; give a run's folder: dare-agg watch RUN"
        )
    check_watched(folder)
    console = stderr_console()
    with serve(folder, port) as page:
        console.print(f"Run: {folder}", markup=False, highlight=False, soft_wrap=True)
        announce(console, page.address)
        try:
            follow_line(console, page.watched)
        except KeyboardInterrupt:
            signals.forget()
    console.print("The page has ended; the run goes on as it was", highlight=False)


@contextlib.contextmanager
def watched(folder: Path, port: int, console: Any) -> Iterator[None]:
    """Show a run that is about to begin in ``folder``, until its command ends."""
    from dare_agg.runs.watch import serve

    with serve(folder, port) as page:
        announce(console, page.address)
        yield


def announce(console: Any, address: str) -> None:
    """Say where the page is, in one line that can be clicked or copied."""
    console.print(f"Page: {address}", markup=False, highlight=False, soft_wrap=True)


def follow_line(console: Any, watched: Watched) -> None:
    """Show the run's facts in a line until interrupted.

    A terminal has one line that changes; elsewhere one is written for each finished round, and
    when the run begins or ends.
    """
    from rich.text import Text

    from dare_agg.errors import StateError
    from dare_agg.runs.live import live_line

    shown: tuple[Any, ...] = ()
    terminal = console.is_terminal and console.color_system is not None
    with console.status("") as status:
        while True:
            try:
                watched.look()
                live, line = watched.facts["live"], live_line(watched.facts)
            except StateError as error:
                live, line = {}, str(error)
            marks = (live.get("state"), live.get("done"), line if terminal else "")
            if marks != shown:
                shown = marks
                if terminal:
                    status.update(Text(line))
                else:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
            time.sleep(POLL_SECONDS)
