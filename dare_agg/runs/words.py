"""Numbers in words for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def human_bytes(count: float) -> str:
    """Format a number of bytes with a decimal unit.

    >>> human_bytes(2_900)
    '2.9 kB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def smaller_by(whole: float, sent: float) -> str:
    """How many times smaller ``sent`` is than ``whole``; "–" where either is nothing.

    >>> smaller_by(90_900_000, 293_000), smaller_by(90_900_000, 56_800_000)
    ('310×', '1.6×')
    """
    if not whole or not sent:
        return "–"
    ratio = whole / sent
    if ratio <= 1.05:
        return "1×"
    return f"{ratio:,.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×".replace(".0×", "×")


def human_seconds(seconds: float) -> str:
    """Format a time roughly.

    >>> human_seconds(200)
    '3 min'
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def without_paths(value: Any) -> Any:
    """A value in which each path of this machine is its last part.

    >>> without_paths({"data": "/home/me/rows.csv", "model": "OWNER/NAME"})
    {'data': 'rows.csv', 'model': 'OWNER/NAME'}
    """
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and "/" in value:
        return ",".join(map(_last_part, value.split(",")))
    return value


def _last_part(word: str) -> str:
    path = Path(word.strip()).expanduser()
    return path.name if path.is_absolute() or word.startswith((".", "~")) else word
