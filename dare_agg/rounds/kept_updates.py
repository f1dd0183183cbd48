"""Updates that were accepted into a buffer and are not merged yet, as files.

A server that dies has them still when it goes on: what is lost is what was under way. Each is one
state file with its checksum (`dare_agg.files.state_file`), written before the answer is recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.errors import StateError, UpdateError
from dare_agg.files.state_file import read_state, write_state
from dare_agg.rounds.buffer import Ticket
from dare_agg.rounds.plan import RoundPlan, plan_from_record

_NAME = re.compile(r"update-(\d{8,})\.state")
_REMEDY = "free space or fix the permissions, then dare-agg run --resume"


@dataclass(frozen=True)
class KeptUpdate:
    """An accepted answer: its ticket and plan, the payloads, and what its sender said beside.

    ``place`` orders answers as they came. ``said`` are plain values, of whoever drives the run.
    """

    ticket: Ticket
    plan: RoundPlan
    place: int
    blob: bytes
    dense_blob: bytes | None
    said: Mapping[str, Any] = field(default_factory=dict)


class KeptUpdates:
    """The files of a folder, one an update."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, update: KeptUpdate) -> None:
        """Keep an update; raises `StateError` where the disk refuses."""
        plan = update.plan.to_record()
        keys = {word: value.hex() for word, value in plan.items() if isinstance(value, bytes)}
        facts = {
            "ticket": asdict(update.ticket),
            "plan": {word: value for word, value in plan.items() if word not in keys},
            "keys": keys,
            "place": update.place,
            "said": dict(update.said),
        }
        payloads = {"update": update.blob, "dense": update.dense_blob}
        arrays = {
            name: np.frombuffer(blob, np.uint8)
            for name, blob in payloads.items()
            if blob is not None
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_state(self._path(update.ticket.number), arrays, facts, remedy=_REMEDY)

    def read(self, numbers: Iterable[int]) -> list[KeptUpdate]:
        """Those of these numbers that are there and whole, in the order in which they came."""
        found = []
        for number in set(numbers) & set(self.numbers()):
            try:
                found.append(_read(self._path(number)))
            except StateError:  # a copy that is not whole is none
                continue
        return sorted(found, key=lambda one: one.place)

    def numbers(self) -> list[int]:
        """The numbers of all that are there."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def drop(self, numbers: Iterable[int]) -> None:
        """Forget updates of these numbers."""
        for number in numbers:
            self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"update-{number:08d}.state"


def _read(path: Path) -> KeptUpdate:
    arrays, facts = read_state(path)
    try:
        keys = {word: bytes.fromhex(value) for word, value in facts["keys"].items()}
        ticket = dict(facts["ticket"])
        ticket["stride"] = tuple(ticket["stride"])
        dense = arrays.get("dense")
        return KeptUpdate(
            Ticket(**ticket),
            plan_from_record({**facts["plan"], **keys}),
            int(facts["place"]),
            arrays["update"].tobytes(),
            None if dense is None else dense.tobytes(),
            facts["said"],
        )
    except (UpdateError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"{path} holds no update: {error}") from error
