"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dare_agg.checkpoint import Left

# Names to a reason; all of them are in the JSON.
_MOST_LEFT = 8


def print_json(value: Mapping[str, Any] | list[Any]) -> None:
    """Print one JSON object on stdout, on one line, keys in the given order.

    NaN and infinities have no place in JSON: they raise `ValueError`.
    """
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_left(left: Sequence[Left]) -> None:
    """Say on stderr which files did not go along with a model, by reason."""
    for why in dict.fromkeys(one.why for one in left):
        files = [one.file for one in left if one.why == why]
        more = f" and {len(files) - _MOST_LEFT} more" if len(files) > _MOST_LEFT else ""
        sys.stderr.write(f"left: {', '.join(files[:_MOST_LEFT])}{more} ({why})\n")


def fitted(table: Table, console: Console) -> Table:
    """The table, or where the console is too narrow for it the same with a row a column.

    Headings and names stay whole then.
    """
    from rich.measure import Measurement
    from rich.table import Table

    if Measurement.get(console, console.options, table).maximum < console.width:
        return table
    columns = [[column.header, *column.cells] for column in table.columns]
    turned = Table(title=table.title)
    for index, cell in enumerate(columns[0]):
        turned.add_column(cell, justify="right" if index else "left", overflow="fold")
    for column in columns[1:]:
        turned.add_row(*column)
    return turned


def stderr_console() -> Console:
    """Return a rich console on stderr, for progress and tables meant for people."""
    return _console(stderr=True)


def stdout_console() -> Console:
    """Return a rich console on stdout, for a command's result as a table."""
    return _console()


def _console(*, stderr: bool = False) -> Console:
    """A console that writes plain text where NO_COLOR is set; rich would still write bold."""
    from rich.console import Console

    return Console(stderr=stderr, color_system=None if os.environ.get("NO_COLOR") else "auto")
