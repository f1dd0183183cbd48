"""Steps in files, a step each, and sums of steps: read where they lie.

A step's file: u64 bytes of the body, the body, the dense part.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dare_agg.downlink.forms import STEP_FORMS
from dare_agg.downlink.grid import TILE, Counts, VersionGrid, add_steps
from dare_agg.downlink.lossless import encode_tile
from dare_agg.downlink.step_form import StepHead
from dare_agg.downlink.steps import HEAD, Step, head_bytes, payload_of, read_steps
from dare_agg.errors import StateError, UpdateError
from dare_agg.files.atomic import file_draft, replace_file

_SIZE = struct.Struct("<Q")


class KeptSteps:
    """The steps of a run in a folder, by number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, number: int, step: Step) -> Step:
        """Keep a step; returns it as it lies. Raises `StateError`."""
        parts = (_SIZE.pack(len(step.body)), step.body, step.dense)
        replace_file(self._path(number), parts, mode=0o600)
        return self.read(number)

    def read(self, number: int) -> Step:
        """The step of a number; raises `StateError` where it is missing or damaged."""
        try:
            return _read(self._path(number))
        except (OSError, struct.error, ValueError, UpdateError, IndexError) as error:
            raise StateError(
                f"step {self._path(number)} cannot be read ({error}); begin the run anew, or put "
                "the folder back from a copy"
            ) from error

    def keep_only(self, numbers: Iterable[int]) -> None:
        """Remove all other steps."""
        kept = {self._path(number).name for number in numbers}
        for path in self.folder.glob("*.step"):
            if path.name not in kept:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.step"


def write_sum(path: Path, head: StepHead, tiles: Iterable[Counts], dense: bytes) -> Step:
    """Write one lossless step of counts that come in tiles of `TILE`, and read it as it lies.

    Raises `StateError` where the disk is full.
    """
    with file_draft(path, mode=0o600) as file:
        file.write(bytes(_SIZE.size + HEAD.size))
        nbytes = sum(file.write(encode_tile(tile)) for tile in tiles)
        file.seek(_SIZE.size + HEAD.size)
        payload = iter(lambda: file.read(1 << 20), b"")
        start = head_bytes(head, payload, nbytes, dense)
        file.write(dense)
        file.seek(0)
        file.write(_SIZE.pack(HEAD.size + nbytes) + start)
    return _read(path)


def summed_tiles(steps: Sequence[Step], grid: VersionGrid) -> Iterator[Counts]:
    """The sum of a chain's whole steps, tile by tile."""
    # Every form yields once for each tile.
    moves = [STEP_FORMS[step.head.form].decode(step.head, payload_of(step), grid) for step in steps]
    for lo in range(0, grid.size, TILE):
        counts = np.zeros(min(TILE, grid.size - lo), np.int32)
        for tiles in moves:
            positions, found = next(tiles)
            add_steps(counts, positions - lo, found)
        yield counts


def _read(path: Path) -> Step:
    with path.open("rb") as file:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    (size,) = _SIZE.unpack_from(whole)
    # Slices of a map are read like bytes, and take no memory.
    body, dense = whole[_SIZE.size : _SIZE.size + size], whole[_SIZE.size + size :]
    (step,) = read_steps(body, dense)  # type: ignore[arg-type]
    return step
