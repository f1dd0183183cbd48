"""The version store on disk: models of any size, versions named by the chain of steps.

As `dare_agg.downlink.server`, for a base that lies on disk and stays there: a version is the base
and whole grid steps, and all that has the model's size lies in files of the store's folder
(`dare_agg.downlink.disk.state`). A round is one pass over tiles: the server's step comes tile by
tile, what was left of earlier ones is added where the form has places, groups of values are
coded, decoded as every client will, rounded to the grid and added. A process's own memory holds
a tile, a group and the payload.

A round either is in the folder's header (``store.state``, replaced as a whole at its end) or never
was: whatever stops it, a kill too, the old bytes of the undo file are put back. They stay until
the next round begins, since the run's own state may be a round behind.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dare_agg.codec.formats import find_values
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.base import BASE_NAME, BASE_VERSION, CHAIN_NAME, VERIFY
from dare_agg.downlink.disk.change import OffTheMasksError, StepStream, VectorStream, move_streamed
from dare_agg.downlink.disk.header import StoreHead, head_in, read_head, write_head
from dare_agg.downlink.disk.kept_steps import KeptSteps, summed_tiles, write_sum
from dare_agg.downlink.disk.state import DiskState, Moments, create_state, open_state
from dare_agg.downlink.forms import Form, find_form
from dare_agg.downlink.grid import TILE, Counts, VersionGrid, grid_from, grid_of
from dare_agg.downlink.held import HeldGroup, held_group
from dare_agg.downlink.lossless import LOSSLESS, encode_counts
from dare_agg.downlink.paths import (
    cheapest_broadcast,
    cheapest_path,
    check_newest,
    head_after,
    nbytes_of,
    parents_of,
)
from dare_agg.downlink.protocol import Broadcast, DrawnMask
from dare_agg.downlink.step_form import Families, StepHead
from dare_agg.downlink.steps import Step, apply_dense, chained_step, dense_head, families_of
from dare_agg.downlink.version_source import VersionSource
from dare_agg.errors import ConfigError, StateError
from dare_agg.files.atomic import replace_file
from dare_agg.files.folder_lock import FolderLock
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.model import GlobalModel, ModelRef
from dare_agg.vectors.sources import array_source
from dare_agg.vectors.tiled import TiledVector, tiles

LOG = logging.getLogger(__name__)
_HEADER = "store.state"
_NAME_BYTES = 256


@dataclass
class VersionStore:
    """The server's half of the chain way (`dare_agg.downlink.protocol.Downlink`).

    ``folder`` is the store's own. ``form`` is a row of `FORMS`, ``dense_values`` the format of the
    dense group's change, ``drop_rate`` that of the form dare, ``keep_bytes`` how many bytes of
    steps are kept for clients that stayed away. ``base_name`` says to people where the base is;
    every ``verify_every`` rounds (0: never) clients compare the whole fingerprint.
    """

    folder: Path
    form: str = "auto"
    dense_values: str = "i8"
    drop_rate: str = "0.9"
    keep_bytes: int = 1 << 28
    base_name: str = ""
    verify_every: int = 0
    name: str = CHAIN_NAME
    steps: list[Step] = field(default_factory=list)
    _base: GlobalModel | None = None
    _model: GlobalModel | None = None
    _grid: VersionGrid | None = None
    _dense: HeldGroup | None = None
    _disk: DiskState | None = None
    _head: StoreHead | None = None
    _sums: dict[tuple[str, str], Step] = field(default_factory=dict)
    _fingerprints: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        find_form(self.form)
        find_values(self.dense_values)
        parse_drop_rate(self.drop_rate)
        for word in ("keep_bytes", "verify_every"):
            value = getattr(self, word)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{word} = {value!r}; a number of at least 0 is needed")
        if len(self.base_name.encode()) > _NAME_BYTES:
            raise ConfigError(
                f"base_name of {len(self.base_name.encode())} bytes; at most {_NAME_BYTES}"
            )
        self._lock = FolderLock(self.folder)
        self._kept = KeptSteps(self.folder / "steps")

    # --- the protocol ----------------------------------------------------------------------

    @property
    def version(self) -> str:
        """The name of the newest version, "" before `start`."""
        return self._head.version if self._head else ""

    @property
    def base_version(self) -> str:
        """The base's fingerprint, "" before `start`."""
        return self._head.base if self._head else ""

    @property
    def base_norm(self) -> float:
        """‖W‖ of the base's delta group, as measured when the store was made."""
        return self._opened().base_norm

    @property
    def count(self) -> int:
        """Rounds that moved the model."""
        return self._opened().count

    @property
    def model(self) -> GlobalModel:
        """The newest version; raises `StateError` before `start`."""
        if self._model is None:
            raise _not_open()
        return self._model

    def start(self, model: GlobalModel) -> GlobalModel:
        """Take ``model`` as the base, unless it is the version this store already is at.

        A first round that a run did not live to keep is undone. Raises `StateError` for a folder
        with rounds of an earlier run, or of another base: nothing is changed there.
        """
        version = model.ref.version
        if self._model is not None and version == self.version:
            return self._model
        self.close()
        self._lock.claim()
        if self._header_path.exists():
            self._open(model)
            self._return_to(version)
        elif (self.folder / "undo").exists():
            raise StateError(
                f"{self.folder} holds rounds of a run, but not {_HEADER}; put it back from a copy, "
                "or name another folder"
            )
        else:
            self._create(model)
        return self.model

    def advance(
        self,
        model: GlobalModel,
        step: FloatVector,
        dense_step: FloatVector | None,
        plans: Sequence[DrawnMask],
    ) -> GlobalModel:
        """As `advance_streamed`, for a step that is a vector."""
        return self.advance_streamed(model, VectorStream(step), dense_step, plans)

    def advance_streamed(
        self,
        model: GlobalModel,
        stream: StepStream,
        dense_step: FloatVector | None,
        plans: Sequence[DrawnMask],
        moments: Sequence[str] | None = None,
    ) -> GlobalModel:
        """Round the change to the grid, keep it as a step and return the new version.

        ``moments`` are the vectors that the stream writes (`moments`); without, those that there
        are stay as they are. Whatever goes wrong, the store is at the version before. Raises
        `StateError` for a model that is not at the store's version and for a full disk,
        `NonFiniteError` for a step that is no number somewhere.
        """
        before = self._opened()
        check_newest(model, before.version)
        families = families_of(plans)
        row = find_form(self.form)
        if not row.fits(families):
            row = find_form(row.otherwise)
        number = max((plan.round for plan in plans), default=before.round + 1)
        self._begin()
        try:
            found = self._tried(row, number, families, stream, dense_step)
            if found is None:
                self._undo()
                self._begin()
                other = find_form(row.otherwise)
                found = self._pass(other, number, families, stream, dense_step)
            after, step = found
            if moments is None:
                after = replace(after, place=before.place)
            else:
                after = replace(after, moments=tuple(moments))
            self._commit(after, step)
        except BaseException:
            self._undo()
            raise
        return self._follow()

    def broadcast(self, model: GlobalModel, have: str) -> Broadcast:
        """Return the fewest bytes that bring a client from ``have`` to ``model``.

        A client that names nothing is sent what leads on from the base, which it must have.
        Raises `StateError` for a model that is not at the store's version.
        """
        head = self._opened()
        return cheapest_broadcast(
            model.ref.version,
            head.version,
            head.base,
            have,
            self.parents(),
            self.path,
            lambda: head.moved,
            None,
        )

    def facts(self) -> dict[str, str]:
        """The base's fingerprint and name, and the newest version's fingerprint where it is due."""
        head = self._opened()
        found = {BASE_VERSION: head.base}
        if self.base_name:
            found[BASE_NAME] = self.base_name
        if head.count and self.verify_every and head.round % self.verify_every == 0:
            found[VERIFY] = self.fingerprint()
        return found

    def fingerprint(self) -> str:
        """The newest version's fingerprint, made of all its values, read tile by tile."""
        if self.version not in self._fingerprints:
            self._fingerprints = {self.version: self.model.fingerprints.version}
        return self._fingerprints[self.version]

    # --- paths -----------------------------------------------------------------------------

    def parents(self) -> list[str]:
        """The versions a chain of kept steps leads from, oldest first."""
        return parents_of(self.steps)

    def path(self, start: str) -> list[Step]:
        """Return the cheapest steps from ``start`` (kept, or the base) to the newest version."""
        head = self._opened()
        return cheapest_path(self.steps, start, head.version, lambda: head.moved, self.summed)

    def summed(self, start: str) -> Step:
        """Return one lossless step from ``start`` to the newest version, kept in a file."""
        head, disk, dense = self._opened(), self._files(), self._dense_group()
        if (start, head.version) in self._sums:
            return self._sums[start, head.version]
        dense_counts = dense.counts
        if start == head.base:
            found: Iterator[Counts] = (
                disk.counts[lo : lo + TILE] for lo in range(0, disk.size, TILE)
            )
        else:
            chain = self.steps[self.parents().index(start) :]
            found = summed_tiles(chain, self._settled_grid())
            dense_counts = np.zeros_like(dense_counts)
            for step in chain:
                apply_dense(step, dense.grid, dense_counts)
        total = write_sum(
            self.folder / f"sum-{start[:12]}.step",
            StepHead(LOSSLESS.name, "f32", "f32", head.round, start, head.version, bytes(16)),
            found,
            encode_counts(dense_counts) if dense.grid.size else b"",
        )
        self._sums[start, head.version] = total
        return total

    # --- resume ----------------------------------------------------------------------------

    def state_arrays(self) -> dict[str, np.ndarray]:
        """What a round state must say of this store: which version it was at."""
        return {"version": np.frombuffer(bytes.fromhex(self.version), np.uint8)}

    def restore(self, base: GlobalModel, arrays: Mapping[str, np.ndarray]) -> GlobalModel:
        """Take up the folder again at the version of `state_arrays`, over its base.

        A store that is a round further, or in the middle of one, goes back. Raises `StateError`
        for one that cannot, or is of another base.
        """
        found = arrays.get("version")
        if found is None or found.shape != (32,) or found.dtype != np.uint8:
            raise StateError("the round was kept without its version; resume from an older round")
        self.close()
        self._lock.claim()
        self._open(base)
        self._return_to(found.tobytes().hex())
        return self.model

    def close(self) -> None:
        """Let go of all files; the store can be started again."""
        if self._disk is not None:
            self._disk.close()
        self._lock.release()
        self._disk = self._head = self._model = self._base = None
        self.steps = []
        self._sums.clear()

    # --- moments of the server step --------------------------------------------------------

    def moments(self, names: Sequence[str], *, fresh: bool) -> Moments:
        """The server step's vectors, read from and written to files in the pass of a round.

        ``fresh`` where it is taken for the first time. Raises `StateError` where the run was begun
        with other ones.
        """
        head = self._opened()
        if head.moments != (() if fresh else tuple(names)):
            raise StateError(
                f"the store holds the server step's vectors {list(head.moments)}, not "
                f"{list(names)}; resume with the server step the run was started with"
            )
        return self._files().moments(names, head.place, fresh=fresh)

    # --- a round ---------------------------------------------------------------------------

    def _begin(self) -> None:
        disk, head = self._files(), self._opened()
        for total in self.folder.glob("sum-*.step"):
            total.unlink(missing_ok=True)
        self._sums.clear()
        disk.begin(self._header_path.read_bytes())
        self._kept.keep_only(head.steps)

    def _tried(
        self,
        row: Form,
        number: int,
        families: Families,
        stream: StepStream,
        dense_step: FloatVector | None,
    ) -> tuple[StoreHead, Step] | None:
        """As `_pass`; None where the form does not bear the step."""
        try:
            return self._pass(row, number, families, stream, dense_step)
        except OffTheMasksError:
            return None

    def _pass(
        self,
        row: Form,
        number: int,
        families: Families,
        stream: StepStream,
        dense_step: FloatVector | None,
    ) -> tuple[StoreHead, Step]:
        before, dense, grid = self._opened(), self._dense_group(), self._settled_grid()
        rate = parse_drop_rate(self.drop_rate)
        head = head_after(row, self.dense_values, number, before.version, families, rate)
        head, payload, moved = move_streamed(self._files(), grid, row, head, stream)
        dense_payload = b""
        if dense_step is not None and dense.grid.size:
            own = dense_head(head, dense.grid.size)
            _, dense_payload = dense.move(row.step.of_dense, own, dense_step, True)
        step = chained_step(head, payload, dense_payload)
        after = replace(
            before,
            version=step.head.child,
            count=before.count + 1,
            round=number,
            moved=before.moved + moved,
            place=1 - before.place,
        )
        return after, step

    def _commit(self, after: StoreHead, step: Step) -> None:
        steps = [*self.steps, self._kept.write(after.count, step)]
        numbers = [*self._opened().steps, after.count]
        while len(steps) > 1 and nbytes_of(steps) > self.keep_bytes:
            steps.pop(0)
            numbers.pop(0)
        after = replace(after, steps=tuple(numbers))
        self._files().flush()
        self._write_header(after)
        self.steps, self._head = steps, after

    def _follow(self) -> GlobalModel:
        """Take the version the files hold as the newest."""
        head, base = self._opened(), self._base
        assert base is not None
        self._files().end()
        if not head.count:
            self._model = base
            return base
        groups, dense = base.groups, self._dense_group()
        ref = ModelRef(head.version, groups.layout.fingerprint, groups.layout.size)
        if groups.dense_layout.size:
            ref = replace(
                ref,
                dense_base=head.version,
                dense_layout=groups.dense_layout.fingerprint,
                dense_size=groups.dense_layout.size,
            )
        delta = base.delta if isinstance(base.delta, TiledVector) else array_source(base.delta)
        values = VersionSource(
            delta, self._settled_grid(), self._files().counts, lambda: self._check(head.version)
        )
        self._model = base.placed(TiledVector(values), dense.values(), ref)
        return self._model

    def _check(self, version: str) -> None:
        if self.version != version:
            now = self.version[:12] or "none"
            raise StateError(
                f"version {version[:12]} is no more: the store is at {now}; ask for the newest"
            )

    def _undo(self) -> None:
        """Put back what a round that came to no end has changed."""
        disk = self._files()
        try:
            header = disk.roll_back()
            if self._header_path.read_bytes() != header:
                replace_file(self._header_path, (header,), mode=0o600)
            disk.forget_undo()
            self._take_header()
        except BaseException:
            # What is left is done when the store is opened again.
            self.close()
            raise
        self._follow()

    # --- files -----------------------------------------------------------------------------

    @property
    def _header_path(self) -> Path:
        return self.folder / _HEADER

    def _create(self, model: GlobalModel) -> None:
        groups = model.groups
        grid = grid_of(groups.layout, model.delta, groups.dtypes)
        norm = math.sqrt(
            math.fsum(
                float(np.sum(np.square(piece), dtype=np.float64)) for _, piece in tiles(model.delta)
            )
        )
        self._disk = create_state(self.folder, grid.size, model.ref.version)
        self._base, self._grid = model, grid
        self._dense = held_group(groups.dense_layout, model.dense, groups.dtypes)
        version = model.ref.version
        self._head = StoreHead(version, version, groups.layout.fingerprint, grid.exponents, norm)
        self._write_header(self._head)
        self._follow()

    def _open(self, base: GlobalModel) -> None:
        """Open the folder's files as they are, over the base that they must be of."""
        self._base = base
        head, _ = read_head(self._header_path)
        layout = base.groups.layout
        if (head.base, head.layout) != (base.ref.version, layout.fingerprint):
            raise StateError(
                f"the store in {self.folder} is of base {head.base[:12]}, this one is "
                f"{base.ref.version[:12]}; give the base the run was started with, or name "
                "another folder"
            )
        self._grid = grid_from(layout, head.exponents, base.groups.dtypes)
        self._dense = held_group(base.groups.dense_layout, base.dense, base.groups.dtypes)
        self._disk = open_state(self.folder, layout.size, head.base)
        before = self._disk.leads_back_to()
        if before and before == self._header_path.read_bytes():
            LOG.warning(
                "%s: a round after %d was not finished; it is undone", self.folder, head.count
            )
            self._undo()
            return
        self._take_header()
        self._follow()

    def _return_to(self, version: str) -> None:
        """Go a round back where the files are one ahead of ``version``."""
        if version != self.version:
            before = self._files().leads_back_to()
            if before and head_in(before, self.folder)[0].version == version:
                LOG.warning(
                    "%s: round %d was not kept by the run; it is undone and done again",
                    self.folder,
                    self._opened().round,
                )
                self._undo()
        if version != self.version:
            head = self._opened()
            self.close()
            raise StateError(
                f"the store in {self.folder} is at version {head.version[:12]} after {head.count} "
                f"rounds, {version[:12]} is asked for; go on with its own run (dare-agg run "
                "--resume), or name another output folder"
            )

    def _write_header(self, head: StoreHead) -> None:
        write_head(self._header_path, head, self._dense_group().arrays())

    def _take_header(self) -> None:
        head, arrays = read_head(self._header_path)
        self._dense_group().take_up(arrays)
        self.steps = [self._kept.read(number) for number in head.steps]
        self._head = head
        if self.steps and self.steps[-1].head.child != head.version:
            raise StateError(
                f"the store in {self.folder} is at version {head.version[:12]}, its last step "
                "leads elsewhere; begin the run anew, or put the folder back from a copy"
            )

    # --- what is there ---------------------------------------------------------------------

    def _opened(self) -> StoreHead:
        if self._head is None:
            raise _not_open()
        return self._head

    def _files(self) -> DiskState:
        if self._disk is None:
            raise _not_open()
        return self._disk

    def _settled_grid(self) -> VersionGrid:
        if self._grid is None:
            raise _not_open()
        return self._grid

    def _dense_group(self) -> HeldGroup:
        if self._dense is None:
            raise _not_open()
        return self._dense


def _not_open() -> StateError:
    return StateError("the version store has no base yet; call start first")
