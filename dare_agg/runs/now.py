"""What a run does right now: a file that its server replaces, read by whoever watches.

It says in which exchange of which round the run is, how many clients were asked and have
answered, and for whom it waits. Names in it are clients' own words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dare_agg.files.json_text import read_json

NOW_FILE = "now.json"
_PHASES = {
    "round": "a round begins",
    "train": "training",
    "merge": "merging",
    "evaluate": "evaluation",
    "end": "the last round is done",
}
_MOST_NAMES = 16


@dataclass(frozen=True)
class Now:
    """Where a run is; ``at`` is when it got there (seconds since 1970, of the server's clock)."""

    method: str = ""
    phase: str = ""
    round: int = 0
    rounds: int = 0
    asked: int = 0
    answered: int = 0
    waiting: tuple[str, ...] = ()
    at: float = 0.0

    def words(self) -> str:
        """As people read it: "training, 3 of 5 answered, waiting for south, west"."""
        said = [_PHASES.get(self.phase, "")]
        left = self.asked - self.answered
        if self.asked:
            said.append(f"{self.answered} of {self.asked} answered")
        if left > 0:
            # Simulated clients are called by numbers.
            names = ", ".join(f"client {n}" if n.isdigit() else n for n in self.waiting)
            more = left - len(self.waiting)
            if names and more > 0:
                names += f" and {more} more"
            said.append(f"waiting for {names or left}")
        return ", ".join(filter(None, said))


def now_text(token: str, now: Mapping[str, Any]) -> bytes:
    """The bytes of the file, of the run with this token."""
    return json.dumps({"token": token, **now}).encode() + b"\n"


def read_now(folder: Path, token: str) -> Now | None:
    """What the file in a run's folder says; None where it is of another start of the run."""
    try:
        value = read_json(folder / NOW_FILE)
    except (OSError, ValueError):
        return None
    return now_of(value) if isinstance(value, dict) and value.get("token") == token else None


def now_of(value: Mapping[str, Any]) -> Now:
    """Read what a server said; what is of another kind counts as not said."""

    def count(key: str) -> int:
        found = value.get(key)
        return min(found, 1 << 31) if type(found) is int and found >= 0 else 0

    def text(key: str) -> str:
        found = value.get(key)
        return found if isinstance(found, str) else ""

    waiting, at = value.get("waiting"), value.get("at")
    names = [one for one in waiting if isinstance(one, str)] if isinstance(waiting, list) else []
    return Now(
        method=text("method"),
        phase=text("phase"),
        round=count("round"),
        rounds=count("rounds"),
        asked=count("asked"),
        answered=count("answered"),
        waiting=tuple(names[:_MOST_NAMES]),
        at=float(at) if isinstance(at, int | float) and abs(at) < 1e12 else 0.0,
    )
