"""State on disk that a crash at any moment leaves whole.

A state file is written beside its place, flushed to disk and renamed over it; it ends in a
checksum of all its bytes. A folder of round states keeps the last few, so a corrupt newest
file costs one round, never the run.

File: ``b"DAREST1\\n"``, u64 length, a safetensors body (arrays, and the rest as JSON in its
metadata), SHA-256 of everything before.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dare_agg.downlink.protocol import Downlink
from dare_agg.errors import StateError
from dare_agg.files.folder_lock import FolderLock
from dare_agg.files.state_file import NamedArrays, read_state, write_state
from dare_agg.rounds.step import StepState, state_from_arrays, state_to_arrays
from dare_agg.vectors.model import GlobalModel

KEEP = 2
_NAME = re.compile(r"round-(\d{8})\.state")
_BASE = "base.state"
# Prefixes of a round's arrays: the server step, the downlink's state, else the model.
_STEP, _DOWN, _MODEL = "step", "down", "model"
_REMEDY = (
    "the last good state is kept: free space or fix the permissions, then dare-agg run --resume"
)


@dataclass(frozen=True)
class RoundState:
    """What a run needs to go on after ``round``: plain facts and named arrays."""

    round: int
    facts: Mapping[str, Any]
    arrays: NamedArrays = field(repr=False)

    def text(self, fact: str) -> str:
        """A fact that is text; raises `StateError` where there is none of this name."""
        value = self.facts.get(fact)
        if not isinstance(value, str):
            raise StateError(f"round {self.round} was kept without {fact!r}; {_REMEDY}")
        return value

    def raw(self, fact: str) -> bytes:
        """A fact that is bytes in hex; raises `StateError` as `text`."""
        try:
            return bytes.fromhex(self.text(fact))
        except ValueError as error:
            raise StateError(f"fact {fact!r} of round {self.round} is no hex; {_REMEDY}") from error


class StateFolder:
    """The round states of a run: the base once, then the last `KEEP` rounds."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = FolderLock(self.path)

    def claim(self) -> None:
        """Make this process the only one that writes here; its end, however, frees the folder.

        Raises `StateError` where another process is at work: after a crash of the SuperLink
        its run may still be going on.
        """
        self._lock.claim()

    def release(self) -> None:
        """Let others write here again."""
        self._lock.release()

    def save_base(self, arrays: NamedArrays, facts: Mapping[str, str] | None = None) -> None:
        """Keep the arrays a run starts from, with their order, before its first round.

        ``facts`` say which base it is where its arrays are not kept. Raises `StateError` where
        rounds of an earlier run are: they are not thrown away.
        """
        if rounds := self.rounds():
            raise StateError(
                f"{self.path} holds {rounds[-1]} rounds of an earlier run; go on with it "
                "(dare-agg run --resume), or name another output folder"
            )
        kept = {**(facts or {}), "order": list(arrays)}
        write_state(self.path / _BASE, arrays, kept, remedy=_REMEDY)

    @property
    def begun(self) -> bool:
        """Whether a run's base was kept here."""
        return (self.path / _BASE).exists()

    def base_facts(self) -> dict[str, Any]:
        """What `save_base` was told of the base; raises `StateError`."""
        return read_state(self.path / _BASE)[1]

    def load_base(self) -> dict[str, NDArray[Any]]:
        """Return the arrays a run started from; raises `StateError`."""
        arrays, facts = read_state(self.path / _BASE)
        order = facts.get("order")
        if not isinstance(order, list) or order != [name for name in order if name in list(arrays)]:
            raise StateError(f"{self.path / _BASE} holds other arrays than it names: {_REMEDY}")
        return {name: arrays[name] for name in order}

    def save(self, state: RoundState) -> None:
        """Store a finished round, then forget the oldest; raises `StateError`."""
        facts = {**state.facts, "round": state.round}
        path = self.path / f"round-{state.round:08d}.state"
        write_state(path, state.arrays, facts, remedy=_REMEDY)
        for number in self.rounds()[:-KEEP]:
            (self.path / f"round-{number:08d}.state").unlink(missing_ok=True)

    def rounds(self) -> list[int]:
        """The rounds stored, ascending."""
        if not self.path.is_dir():
            return []
        found = (_NAME.fullmatch(name) for name in os.listdir(self.path))
        return sorted(int(match[1]) for match in found if match)

    def load(self) -> tuple[RoundState | None, list[str]]:
        """Return the newest whole round state and what was wrong with newer ones.

        None where no round was finished. Raises `StateError` when there are round states
        and not one of them is whole.
        """
        problems = []
        rounds = self.rounds()
        for number in reversed(rounds):
            try:
                arrays, facts = read_state(self.path / f"round-{number:08d}.state")
                if facts.get("round") != number:
                    raise StateError(f"the state of round {number} says that it is of another")
            except StateError as error:
                problems.append(str(error))
                continue
            return RoundState(number, facts, arrays), problems
        if rounds:
            raise StateError(
                f"none of the {len(rounds)} round states in {self.path} is whole: {problems[0]}"
            )
        return None, problems


def pack_round(
    number: int,
    model: GlobalModel,
    step_state: StepState,
    facts: Mapping[str, Any],
    downlink: Downlink,
) -> RoundState:
    """Gather a finished round: the model (or the downlink's state of it) and the server step."""
    arrays: dict[str, NDArray[Any]] = {
        f"{_STEP}/{name}": array for name, array in state_to_arrays(step_state).items()
    }
    if kept := downlink.state_arrays():
        arrays.update({f"{_DOWN}/{name}": array for name, array in kept.items()})
    else:
        arrays[f"{_MODEL}/delta"], arrays[f"{_MODEL}/dense"] = model.delta[:], model.dense
    facts = {**facts, "downlink": downlink.name, "version": model.ref.version}
    return RoundState(number, facts, arrays)


def unpack_model(state: RoundState, base: GlobalModel, downlink: Downlink) -> GlobalModel:
    """Bring ``downlink`` and the model back to where a round was finished.

    Raises `StateError` where ``base`` or the downlink's settings are not those of the run.
    """
    if state.text("downlink") != downlink.name:
        raise StateError(
            f"the run was kept with downlink {state.text('downlink')!r}, this strategy has "
            f"{downlink.name!r}; resume with the settings the run was started with"
        )
    if kept := part_of(state, _DOWN):
        model = downlink.restore(base, kept)
    else:
        found = part_of(state, _MODEL)
        if found.keys() != {"delta", "dense"}:
            raise StateError(f"round {state.round} was kept without its model; {_REMEDY}")
        model = base.placed(found["delta"], found["dense"])
    if model.ref.version != state.text("version"):
        raise StateError(
            f"round {state.round} was kept as version {state.text('version')[:12]} and reads as "
            f"{model.ref.version[:12]}; resume with the settings the run was started with"
        )
    return model


def part_of(state: RoundState, prefix: str) -> dict[str, NDArray[Any]]:
    """The arrays of a round state under a prefix."""
    return {
        name.removeprefix(prefix + "/"): array
        for name, array in state.arrays.items()
        if name.startswith(prefix + "/")
    }


def unpack_step(state: RoundState) -> StepState:
    """Return the server step's state of a finished round."""
    return state_from_arrays(part_of(state, _STEP))
