"""What a version store holds of a model's size, in files, and how a round changes it.

Counts of grid steps (two bytes a parameter), the rest of rounding and coding (one byte) and, for
server steps that have some, moments (float32, in pairs: a round reads one and writes the other).
Whatever is changed in place stands in the undo file before, until the next round begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dare_agg.downlink.disk.counts_file import CountsFile, create_counts, halves_of, open_counts
from dare_agg.downlink.disk.mapped import MappedVector, create_mapped, open_mapped
from dare_agg.downlink.disk.rest import Codes
from dare_agg.downlink.disk.undo import (
    UndoWriter,
    begin_undo,
    forget_records,
    header_before,
    old_values,
)
from dare_agg.downlink.disk.undo_record import OldValues
from dare_agg.downlink.grid import LIMIT, Positions
from dare_agg.errors import StateError
from dare_agg.vectors.layout import FloatVector

_COUNTS, _REST, _UNDO = "counts", "rest", "undo"
# Positions whose old values are written at a time.
_BATCH = 1 << 18


class DiskState:
    """The files of one store; make them with `create_state` or `open_state`."""

    def __init__(self, folder: Path, counts: CountsFile, rest: MappedVector) -> None:
        self.folder, self.counts, self.rest = folder, counts, rest
        self.size, self.base = counts.size, counts.base
        self._moments: dict[str, tuple[MappedVector, MappedVector]] = {}
        self._undo: UndoWriter | None = None

    def begin(self, header: bytes) -> None:
        """Begin a round: what is changed from here on can be undone, back to ``header``."""
        self._undo = begin_undo(self.folder / _UNDO, header)

    def changes(self) -> Changes:
        """What a round changes, to be added in ascending order of positions."""
        if self._undo is None:
            raise StateError("no round has begun in this store")
        return Changes(self, self._undo)

    def moments(self, names: Sequence[str], place: int, *, fresh: bool) -> Moments:
        """The server step's vectors: read from the files of ``place``, written to the others.

        With ``fresh`` they are made, of zeros. Raises `StateError`.
        """
        for name in names:
            if fresh:
                for vector in self._moments.pop(name, ()):
                    vector.close()
            if name not in self._moments:
                make = create_mapped if fresh else open_mapped
                found = [
                    make(self.folder / f"{name}.{at}", name, "<f4", self.size, self.base)
                    for at in (0, 1)
                ]
                self._moments[name] = (found[0], found[1])
        return Moments({name: self._moments[name] for name in names}, place)

    def flush(self) -> None:
        """Have all that a round wrote on the disk; raises `StateError`."""
        self.counts.flush()
        self.rest.flush()
        for pair in self._moments.values():
            for vector in pair:
                vector.flush()

    def end(self) -> None:
        """Let go of the undo file, which stays until the next round begins."""
        if self._undo is not None:
            self._undo.close()
            self._undo = None

    def leads_back_to(self) -> bytes:
        """The header that can be undone to, b"" for none; raises `StateError`."""
        return header_before(self.folder / _UNDO)

    def roll_back(self) -> bytes:
        """Undo the round that the undo file is of; returns the header of the one before.

        May be done again, as far as it came. Raises `StateError`.
        """
        self.end()
        header = header_before(self.folder / _UNDO)
        for old in old_values(self.folder / _UNDO):
            self.counts.put_halves(old.positions, old.low, old.high)
            self.rest.values[old.positions] = old.rest
            self.rest.passed(int(old.positions[-1] - old.positions[0]))
        self.flush()
        # The room is needed where the disk is full.
        forget_records(self.folder / _UNDO)
        return header

    def forget_undo(self) -> None:
        """Remove the undo file of a round that was undone."""
        (self.folder / _UNDO).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of all files."""
        self.end()
        self.counts.close()
        self.rest.close()
        for pair in self._moments.values():
            for vector in pair:
                vector.close()
        self._moments.clear()


class Moments:
    """The server step's vectors while a round goes over them, tile by tile."""

    def __init__(self, pairs: Mapping[str, tuple[MappedVector, MappedVector]], place: int) -> None:
        self._pairs, self._place = pairs, place

    def read(self, lo: int, hi: int) -> dict[str, FloatVector]:
        """Copies of the vectors' elements before the round."""
        return {name: np.array(self._of(name, 0).values[lo:hi]) for name in self._pairs}

    def write(self, lo: int, vectors: Mapping[str, FloatVector]) -> None:
        """Keep their elements after it, from ``lo`` on."""
        for name, values in vectors.items():
            target = self._of(name, 1)
            target.values[lo : lo + values.size] = values
            for vector in self._pairs[name]:
                vector.passed(values.size)

    def _of(self, name: str, turn: int) -> MappedVector:
        return self._pairs[name][(self._place + turn) % 2]


class Changes:
    """New counts and rests, gathered until they are worth a record of the undo file.

    ``moved`` is by how many more parameters are now elsewhere than in the base.
    """

    def __init__(self, state: DiskState, undo: UndoWriter) -> None:
        self._state, self._undo = state, undo
        self._waiting: list[tuple[Positions, Positions, Codes | None]] = []
        self._count = 0
        self.moved = 0

    def add(self, positions: Positions, steps: Positions, rest: Codes | None) -> None:
        """Move counts by whole steps and put rests (None: they stay) at ascending positions."""
        if positions.size:
            self._waiting.append((positions, steps, rest))
            self._count += positions.size
        if self._count >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting: old values to the undo file, then new ones where they belong.

        Raises `StateError` for a full disk, and beyond int32.
        """
        if not self._waiting:
            return
        positions = _joined([at for at, _, _ in self._waiting])
        steps = _joined([found for _, found, _ in self._waiting])
        rests = [rest for _, _, rest in self._waiting if rest is not None]
        self._waiting.clear()
        self._count = 0
        counts, rest = self._state.counts, self._state.rest
        low, high = counts.halves(positions)
        self._undo.record(OldValues(positions, low, rest.values[positions], high))
        old = low.astype(np.int64)
        if high is not None:
            old = (old + (high.astype(np.int64) << 16)).astype(np.int32).astype(np.int64)
        new = old + steps
        if new.max() > LIMIT or new.min() < -LIMIT:
            raise StateError(
                f"a parameter moved {int(np.abs(new).max())} grid steps from the base, at most "
                f"{LIMIT} fit; start a new run from the last checkpoint, or lower the learning rate"
            )
        self.moved += int(np.count_nonzero(new)) - int(np.count_nonzero(old))
        counts.replace_halves(positions, high, *halves_of(new))
        if rests:
            rest.values[positions] = _joined(rests)
        rest.passed(int(positions[-1] - positions[0]))


def create_state(folder: Path, size: int, base: str) -> DiskState:
    """Make the files of a store at its base; raises `StateError` where there is no room."""
    counts = create_counts(folder / _COUNTS, size, base)
    try:
        return DiskState(folder, counts, create_mapped(folder / _REST, _REST, "u1", size, base))
    except BaseException:
        counts.close()
        raise


def open_state(folder: Path, size: int, base: str) -> DiskState:
    """Open the files of a store; raises `StateError` for what is missing, damaged or foreign."""
    counts = open_counts(folder / _COUNTS, size, base)
    try:
        return DiskState(folder, counts, open_mapped(folder / _REST, _REST, "u1", size, base))
    except BaseException:
        counts.close()
        raise


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
