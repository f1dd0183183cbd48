"""Run folders as servers leave them, for tests of what is shown of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOKEN = "ab" * 8
# Words that would be HTML, a terminal's commands or another direction of writing.
EVIL = (
    "<img src=x onerror=\"window.hacked='img'\">",
    "</script><script>window.hacked='script'</script>",
    "'\"><svg onload=window.hacked='svg'>",
    "<!--<script>\u202eevil\x1b[31m",
)


def facts_in(page: str) -> dict[str, Any]:
    """The facts that stand in a report."""
    start = page.index(">", page.index('id="facts"')) + 1
    facts: dict[str, Any] = json.loads(page[start : page.index("</script>", start)])
    return facts


def a_row(method: str, number: int, accuracy: float, **more: Any) -> dict[str, Any]:
    """A row of three clients, one round of ten seconds."""
    return {
        "method": method, "round": number, "accuracy": accuracy, "loss": 2 - accuracy,
        "train-loss": 2.1 - accuracy, "clients": 3, "accepted": 3, "rejected": [],
        "parameters": 1000, "update_bytes_per_client": 400, "dense_bytes_per_client": 100,
        "upload_bytes_per_client": 500, "download_bytes_per_client": 4000,
        "upload_bytes": 1500, "download_bytes": 12000, "drop_rate": 0.9, "value_format": "b1",
        "noise": 0.05, "noise_of_change": 1.5, "round_seconds": 9.0, "seconds": 10.0 * number,
        "by_client": [
            {"client": name, "bytes": 500, "examples": 10.0 * (1 + place), "p": 0.9, "values": "b1"}
            for place, name in enumerate(("north", "south", "west"))
        ],
        **more,
    }  # fmt: skip


def made_run(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    status: str = "running",
    now: Mapping[str, Any] | None = None,
    log: str = "",
    **config: Any,
) -> Path:
    """Write a run's files; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {"num-rounds": 5, "methods": ["fedavg", "dare-ties"], "model": "minilm", "data": "x"}
    state = {"status": status, "token": TOKEN, "config": {**words, **config}}
    (folder / "run.json").write_text(json.dumps(state))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if now is not None:
        (folder / "now.json").write_text(json.dumps({"token": TOKEN, **now}))
    if log:
        (folder / "run.log").write_text(log)
    return folder


def two_methods(folder: Path, rounds: int = 4, apart: float = 0.0, **more: Any) -> Path:
    """A run whose second method is ``apart`` from the first in each round."""
    rows = [a_row("fedavg", n, 0.4 + n / 10) for n in range(1, rounds + 1)]
    rows += [a_row("dare-ties", n, 0.4 + n / 10 + apart) for n in range(1, rounds + 1)]
    return made_run(folder, rows, **more)
