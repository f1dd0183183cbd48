"""A group of tensors on the grid, held in memory: base, whole steps, and what was not sent yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from dare_agg.downlink.grid import Counts, VersionGrid, add_steps, grid_of
from dare_agg.downlink.step_form import StepForm, StepHead
from dare_agg.errors import StateError
from dare_agg.vectors.layout import FloatVector, Layout


@dataclass
class HeldGroup:
    """One group's place on the grid; make one with `held_group`."""

    grid: VersionGrid
    base: FloatVector
    counts: Counts
    rest: FloatVector

    def values(self) -> FloatVector:
        """The group's values at this version."""
        return self.grid.values(self.base, self.counts)

    def move(
        self, form: StepForm, head: StepHead, step: FloatVector, feedback: bool
    ) -> tuple[StepHead, bytes]:
        """Move the counts by what clients will decode; returns head and payload of the step."""
        if feedback:
            self.rest += step
        payload, count = form.encode(head, self.rest if feedback else step, self.grid)
        head = replace(head, survivors=count)
        for positions, steps in form.decode(head, payload, self.grid):
            add_steps(self.counts, positions, steps)
            if feedback:
                self.rest[positions] -= self.grid.value_at(positions, steps)
        return head, payload

    def arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Counts and rest by name, for a state."""
        return {f"{prefix}counts": self.counts, f"{prefix}rest": self.rest}

    def take_up(self, arrays: Mapping[str, np.ndarray], prefix: str = "") -> None:
        """Go on from `arrays`; raises `StateError` for others than this group's."""
        for what, dtype in (("counts", np.int32), ("rest", np.float32)):
            found = arrays.get(prefix + what)
            if found is None or found.shape != (self.grid.size,) or found.dtype != dtype:
                raise StateError(
                    f"version state holds no {prefix}{what} of {self.grid.size} "
                    f"{np.dtype(dtype)}; resume from an older round"
                )
            setattr(self, what, np.array(found))


def held_group(
    layout: Layout, base: FloatVector, dtypes: Mapping[str, np.dtype] | None = None
) -> HeldGroup:
    """A group at its base; raises `NonFiniteError` where that is not finite."""
    grid = grid_of(layout, base, dtypes)
    return HeldGroup(grid, base, np.zeros(grid.size, np.int32), np.zeros(grid.size, np.float32))
