"""One pass over a round's change: step and rest in, coded, rounded as clients will, and kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from dare_agg.downlink.disk.rest import rest_codes, rest_values
from dare_agg.downlink.disk.state import Changes, DiskState
from dare_agg.downlink.forms import Form
from dare_agg.downlink.grid import TILE, Positions, VersionGrid
from dare_agg.downlink.step_form import Settled, StepHead
from dare_agg.errors import DareError
from dare_agg.vectors.layout import FloatVector, check_finite
from dare_agg.vectors.tiled import AnyVector, retiled, tiles


class StepStream(Protocol):
    """The step of a round, to be added to the parameters; read once, or again from the start."""

    def tiles(self) -> Iterator[tuple[int, FloatVector]]:
        """Yield ``(first, elements)`` over the whole vector, ascending, in any sizes.

        Each is the caller's until the next is asked for.
        """


@dataclass(frozen=True)
class VectorStream:
    """A step that is there already, or can be read in slices."""

    step: AnyVector

    def tiles(self) -> Iterator[tuple[int, FloatVector]]:
        """As `StepStream`."""
        return tiles(self.step)


class OffTheMasksError(DareError):
    """The step is other than 0 where a form has no places."""


def move_streamed(
    disk: DiskState, grid: VersionGrid, row: Form, head: StepHead, stream: StepStream
) -> tuple[StepHead, bytes, int]:
    """Move counts and rest by a round's step; returns the head, the payload, and how many more
    parameters are now elsewhere than in the base.

    The state is in the middle of a round until its header says otherwise. Raises
    `OffTheMasksError` where the form does not bear the step, `NonFiniteError` and `StateError`.
    """
    writer = row.step.write(head, grid)
    settled, off = disk.changes(), disk.changes()
    rests = disk.rest

    def keep(found: Iterator[Settled]) -> None:
        for positions, change, steps in found:
            _keep(settled, grid, positions, change, steps, row.feedback)

    for lo, step in retiled(stream.tiles(), grid.size, TILE):
        check_finite(grid.layout, step, "server step", lo)
        positions = writer.places()
        at = positions - lo
        change = step.take(at)
        if row.only_masks or (row.feedback and positions.size < step.size):
            stray = np.count_nonzero(step != 0) - np.count_nonzero(change != 0)
            if stray and row.only_masks:
                raise OffTheMasksError(f"{stray} values off the round's masks")
            if stray:
                _keep_off(off, grid, rests.values, lo, step, at)
        if row.feedback:
            codes = rests.values[lo : lo + step.size].take(at)
            # A rest of zero is the rule at first, and adding it would change no bit but -0's.
            change += rest_values(codes, grid.factors(positions))
        keep(writer.add(change))
    keep(writer.finish())
    for changes in (settled, off):
        changes.flush()
    return replace(head, survivors=writer.count), writer.payload(), settled.moved


def _keep(
    changes: Changes,
    grid: VersionGrid,
    positions: Positions,
    change: FloatVector,
    steps: Positions,
    feedback: bool,
) -> None:
    if not feedback:
        changes.add(positions, steps, None)
        return
    factors = grid.factors(positions)
    left = change - (steps / factors).astype(np.float32)
    changes.add(positions, steps, rest_codes(left, factors))


def _keep_off(
    changes: Changes,
    grid: VersionGrid,
    rests: np.ndarray,
    lo: int,
    step: FloatVector,
    places: Positions,
) -> None:
    """Add to the rest what a step holds where its form sends nothing."""
    elsewhere = step != 0
    elsewhere[places] = False
    positions = np.flatnonzero(elsewhere) + lo
    factors = grid.factors(positions)
    change = step[elsewhere] + rest_values(rests[positions], factors)
    changes.add(positions, np.zeros(positions.size, np.int64), rest_codes(change, factors))
