"""A bar for what takes longer than two seconds and cannot say how far it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = 2.0


@contextmanager
def busy(what: str, console: Console | None = None, patience: float = PATIENCE) -> Iterator[None]:
    """Show ``what`` with a moving bar and the seconds so far, once it takes that long.

    On a terminal alone, on stderr, and gone when it is done.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from dare_agg.cli.output import stderr_console

    console = console or stderr_console()
    if not console.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True)
    progress.add_task(what, total=None)
    timer = threading.Timer(patience, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        progress.stop()
