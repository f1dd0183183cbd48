"""The server's version store: small immutable steps down, the same bits at every client.

After a round the merged change is coded in few bits, decoded as every client will decode it,
rounded to whole steps of the version grid and added; what coding and rounding left out is
kept and added to the next change (server feedback). A client that names the version it holds
is sent the cheapest way to the newest one: the chain of steps, their exact sum, or the base
and either. Every way ends in the same integers, hence in the same parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dare_agg.codec.formats import find_values
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.base import (
    BASE_VERSION,
    DENSE_STEPS,
    DOWNLINK_NAME,
    STEPS,
    write_base,
)
from dare_agg.downlink.forms import find_form
from dare_agg.downlink.held import HeldGroup, held_group
from dare_agg.downlink.lossless import LOSSLESS, encode_counts
from dare_agg.downlink.paths import (
    cheapest_broadcast,
    cheapest_path,
    check_newest,
    head_after,
    parents_of,
)
from dare_agg.downlink.protocol import Broadcast, DrawnMask
from dare_agg.downlink.step_form import StepHead
from dare_agg.downlink.steps import (
    Step,
    apply_step,
    dense_head,
    families_of,
    read_steps,
    write_step,
)
from dare_agg.errors import ConfigError, StateError
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.model import Arrays, GlobalModel


@dataclass
class VersionDownlink:
    """The server's half of the downlink (`dare_agg.downlink.protocol.Downlink`).

    ``form`` is a row of `FORMS`, ``dense_values`` the format of the dense group's change,
    ``drop_rate`` that of the form dare, ``keep_bytes`` how many bytes of steps are kept for
    clients that stayed away; older ones get the exact sum from the base.
    """

    form: str = "auto"
    dense_values: str = "i8"
    drop_rate: str = "0.9"
    keep_bytes: int = 1 << 28
    name: str = DOWNLINK_NAME
    base_version: str = ""
    version: str = ""
    steps: list[Step] = field(default_factory=list)
    _model: GlobalModel | None = None
    _base_model: GlobalModel | None = None
    _delta: HeldGroup | None = None
    _dense: HeldGroup | None = None
    _sums: dict[tuple[str, str], Step] = field(default_factory=dict)
    _base_payload: bytes = b""

    def __post_init__(self) -> None:
        find_form(self.form)
        find_values(self.dense_values)
        parse_drop_rate(self.drop_rate)
        if not isinstance(self.keep_bytes, int) or self.keep_bytes < 0:
            raise ConfigError(f"keep_bytes = {self.keep_bytes!r}; a number of bytes is needed")

    # --- the protocol ----------------------------------------------------------------------

    def start(self, model: GlobalModel) -> GlobalModel:
        """Take ``model`` as the base, unless it is the version this store already is at."""
        version = model.ref.version
        if self._model is not None and version == self.version:
            return self._model
        groups = model.groups
        self._delta = held_group(groups.layout, model.delta[:], groups.dtypes)
        self._dense = held_group(groups.dense_layout, model.dense, groups.dtypes)
        self._model = self._base_model = model
        self.base_version = self.version = version
        self.steps.clear()
        self._sums.clear()
        self._base_payload = b""
        return model

    def advance(
        self,
        model: GlobalModel,
        step: FloatVector,
        dense_step: FloatVector | None,
        plans: Sequence[DrawnMask],
    ) -> GlobalModel:
        """Round the change to the grid, store it as a step and return the new version.

        Raises `StateError` for a model that is not at the store's version.
        """
        delta, dense = self._groups()
        check_newest(model, self.version)
        families = families_of(plans)
        row = find_form(self.form)
        if not row.fits(families) or not row.bears(step, families, delta.grid.layout.sizes):
            row = find_form(row.otherwise)
        number = max((plan.round for plan in plans), default=0)
        rate = parse_drop_rate(self.drop_rate)
        head = head_after(row, self.dense_values, number, self.version, families, rate)
        head, payload = delta.move(row.step, head, step, row.feedback)
        dense_payload = b""
        if dense_step is not None and dense.grid.size:
            own = dense_head(head, dense.grid.size)
            _, dense_payload = dense.move(row.step.of_dense, own, dense_step, True)
        moved = model.placed(delta.values(), dense.values())
        self._model, self.version = moved, moved.ref.version
        self.steps.append(write_step(replace(head, child=self.version), payload, dense_payload))
        self._sums.clear()
        while len(self.steps) > 1 and sum(s.nbytes for s in self.steps) > self.keep_bytes:
            self.steps.pop(0)
        return moved

    def broadcast(self, model: GlobalModel, have: str) -> Broadcast:
        """Return the fewest bytes that bring a client from ``have`` to ``model``.

        Raises `StateError` for a model that is not at the store's version.
        """
        return cheapest_broadcast(
            model.ref.version,
            self.version,
            self.base_version,
            have,
            self.parents(),
            self.path,
            self._moved,
            self._base_bytes,
        )

    def facts(self) -> dict[str, str]:
        return {BASE_VERSION: self.base_version}

    # --- paths -----------------------------------------------------------------------------

    def parents(self) -> list[str]:
        """The versions a chain of kept steps leads from, oldest first."""
        return parents_of(self.steps)

    def path(self, start: str) -> list[Step]:
        """Return the cheapest steps from ``start`` (kept, or the base) to the newest version."""
        return cheapest_path(self.steps, start, self.version, self._moved, self.summed)

    def _moved(self) -> int:
        return int(np.count_nonzero(self._groups()[0].counts))

    def summed(self, start: str) -> Step:
        """Return one lossless step from ``start`` to the newest version."""
        if (start, self.version) in self._sums:
            return self._sums[start, self.version]
        delta, dense = self._groups()
        counts, dense_counts = delta.counts, dense.counts
        if start != self.base_version:
            counts, dense_counts = np.zeros_like(counts), np.zeros_like(dense_counts)
            for step in self.steps[self.parents().index(start) :]:
                apply_step(step, delta.grid, counts, dense.grid, dense_counts)
        number = self.steps[-1].head.round if self.steps else 0
        head = StepHead(LOSSLESS.name, "f32", "f32", number, start, self.version, bytes(16))
        total = write_step(
            head,
            encode_counts(counts),
            encode_counts(dense_counts) if dense.grid.size else b"",
        )
        self._sums[start, self.version] = total
        return total

    # --- resume ----------------------------------------------------------------------------

    def state_arrays(self) -> dict[str, np.ndarray]:
        """Return all that a restart needs besides the base, as named arrays."""
        delta, dense = self._groups()
        body = b"".join(step.body for step in self.steps)
        dense_body = b"".join(step.dense for step in self.steps)
        return {
            **delta.arrays(),
            **dense.arrays("dense-"),
            STEPS: np.frombuffer(body, np.uint8),
            DENSE_STEPS: np.frombuffer(dense_body, np.uint8),
        }

    def restore(self, base: GlobalModel, arrays: Mapping[str, np.ndarray]) -> GlobalModel:
        """Take up `state_arrays` again over the base they belong to; returns the model.

        Raises `StateError` for arrays that are incomplete or of another model.
        """
        self.start(base)
        delta, dense = self._groups()
        delta.take_up(arrays)
        dense.take_up(arrays, "dense-")
        body, dense_body = (
            np.asarray(arrays.get(k, np.empty(0, np.uint8)), np.uint8).tobytes()
            for k in (STEPS, DENSE_STEPS)
        )
        self.steps = read_steps(body, dense_body)
        self._model = base.placed(delta.values(), dense.values())
        self.version = self._model.ref.version
        if self.steps and self.steps[-1].head.child != self.version:
            raise StateError(
                f"version state ends at {self.version[:12]}, its last step at "
                f"{self.steps[-1].head.child[:12]}; resume from an older round"
            )
        return self._model

    # --- inside ----------------------------------------------------------------------------

    def _groups(self) -> tuple[HeldGroup, HeldGroup]:
        if self._delta is None or self._dense is None:
            raise StateError("the version store has no base yet; call start first")
        return self._delta, self._dense

    def base_arrays(self) -> Arrays:
        """The base's arrays, as the run started with them.

        Raises `StateError` before `start`.
        """
        if self._base_model is None:
            raise StateError("the version store has no base yet; call start first")
        return self._base_model.arrays()

    def _base_bytes(self) -> bytes:
        if not self._base_payload:
            self._base_payload = write_base(self.base_arrays())
        return self._base_payload
