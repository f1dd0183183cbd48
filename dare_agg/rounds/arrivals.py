"""The record of an asynchronous run: who was asked, who answered, what was merged, in order.

It is all that speed decides. A run that follows the record of another, with the same seed and
clients that compute the same, ends with the same bits, however fast its own clients are. A line
of JSON an event, appended as it happens::

    {"kind": "ask", "number": 7, "client": "3", "version": 2}
    {"kind": "lost", "number": 7, "client": "3", "version": 2, "why": "late"}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dare_agg.errors import FormatError, RunError, StateError
from dare_agg.files.atomic import replace_file
from dare_agg.files.json_text import parse_json

KINDS = ("ask", "answer", "lost", "merge")
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Event:
    """One event of a run.

    Plan ``number`` was dealt to ``client`` at so many merges (``version``), was answered so that it
    counts, or was lost, ``why`` being a row of `dare_agg.errors.REASONS`; or it is the merge of
    this number.
    """

    kind: str
    number: int
    client: str = ""
    version: int = 0
    why: str = ""

    def to_line(self) -> str:
        """The event as a line; what is empty is left out."""
        return json.dumps({key: value for key, value in asdict(self).items() if value != ""})


_NOTHING = Event("", 0)


def read_events(path: Path) -> list[Event]:
    """The events of a file; a last line that a crash cut off is none.

    Raises `StateError` for a file that cannot be read or holds something else.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise StateError(f"{path} has more than {_MOST_BYTES} bytes; no run writes so many")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StateError(f"record {path} cannot be read: {error.strerror or error}") from error
    whole = lines[:-1]  # what follows the last line's end was cut off, or is nothing
    return [_event(line, f"{path}, line {place}") for place, line in enumerate(whole, 1)]


def _event(line: bytes, where: str) -> Event:
    wrong = StateError(f"{where} is no event of a run; give its arrivals.jsonl")
    try:
        found: Any = parse_json(line)
        event = Event(**{name: found[name] for name in asdict(_NOTHING) if name in found})
    except (FormatError, TypeError) as error:
        raise wrong from error
    numbers, texts = (event.number, event.version), (event.client, event.why)
    whole = all(type(number) is int and number >= 0 for number in numbers)
    if not whole or event.kind not in KINDS or not all(isinstance(text, str) for text in texts):
        raise wrong
    return event


@dataclass
class Replay:
    """The events that a run is to follow; `next` is the one that must come now."""

    events: list[Event]
    at: int = field(default=0)

    @property
    def next(self) -> Event | None:
        """The next event, None where the record ends."""
        return self.events[self.at] if self.at < len(self.events) else None

    def follow(self, event: Event) -> None:
        """Go on by an event that happened; raises `RunError` where the record has another."""
        if (due := self.next) is None:
            return
        if event != due:
            raise RunError(
                f"event {self.at + 1} of the record is {due.to_line()}, and this run has "
                f"{event.to_line()}: its clients, data or settings are others; give those of the "
                "run that was recorded, or leave the record out"
            )
        self.at += 1


class Record:
    """Appends events to a file, each on the disk before anything is made of it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, events: Iterable[Event] = ()) -> None:
        """Start the file with these events; what was there is gone. Raises `StateError`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, [f"{event.to_line()}\n".encode() for event in events])

    def add(self, event: Event) -> None:
        """Append an event; raises `StateError` where the disk refuses."""
        try:
            with self.path.open("ab") as file:
                file.write(f"{event.to_line()}\n".encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StateError(
                f"{self.path} was not written: {error.strerror or error}; free space or fix the "
                "permissions, then dare-agg run --resume"
            ) from error
