"""Rows of results: where they are kept, read, appended and stamped with versions."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def versions() -> dict[str, str]:
    """Versions of what decides the figures."""
    from importlib.metadata import version

    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("dare-agg", "numpy", "torch", "transformers"):
        found[name] = version(name)
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a results file; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one line and flush it to disk, on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
