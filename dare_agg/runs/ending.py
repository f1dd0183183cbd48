"""What run.json says of a run that could not say it itself: interrupted, or killed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dare_agg.files.atomic import replace_file
from dare_agg.files.json_text import read_json
from dare_agg.runs.rows import STATE_FILE

RUNNING, COMPLETED, FAILED, INTERRUPTED = "running", "completed", "failed", "interrupted"


def note_end(folder: Path, status: str, error: str, config: Mapping[str, Any]) -> None:
    """Write ``status`` and ``error`` where the run's own last word is not its end.

    A run that was interrupted before its server wrote run.json gets one with ``config``, the
    settings it was begun with, so that it can be resumed. Raises `StateError`.
    """
    path = folder / STATE_FILE
    try:
        state = read_json(path)
    except (OSError, ValueError):
        state = {"config": dict(config)} if status == INTERRUPTED else None
    if not isinstance(state, dict):
        return
    unfinished = {RUNNING, None} | ({FAILED} if status == INTERRUPTED else set())
    if state.get("status") in unfinished:
        value = {**state, "status": status, "error": error}
        replace_file(path, ((json.dumps(value, indent=1) + "\n").encode(),))
