"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_json(value: Mapping[str, Any] | list[Any]) -> None:
    """Print one JSON object on stdout, on one line, keys in the given order.

    NaN and infinities have no place in JSON: they raise `ValueError`.
    """
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()


def stderr_console() -> Console:
    """Return a rich console on stderr, for progress and tables meant for people."""
    from rich.console import Console

    return Console(stderr=True)


def stdout_console() -> Console:
    """Return a rich console on stdout, for a command's result as a table."""
    from rich.console import Console

    return Console()
