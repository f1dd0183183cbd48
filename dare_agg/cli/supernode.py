"""`dare-agg supernode`: a SuperNode that runs the party's own copy of the app and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def supernode(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="-- ARGUMENTS", help="What flower-supernode takes, after a --."),
    ],
    app: Annotated[
        Path | None, typer.Option(help="Folder of the Flower app [default: this checkout].")
    ] = None,
) -> None:
    """Run flower-supernode for this party's own copy of the app alone."""
    from dare_agg.files.app_config import find_app
    from dare_agg.flower.processes.pinned_node import run_pinned

    run_pinned(find_app(app), arguments)
