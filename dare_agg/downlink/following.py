"""The client's half of the chain way: a base on disk, and a version of it in a file of counts.

``<folder>/heads/<client>-<base>.counts`` are the counts of grid steps that a client's version is
away from the base, moved in place from version to version. While they are being moved they say
so: whoever dies then, or finds them torn or of another base, forgets them and is sent one sum
from the base. No part of a model is held in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dare_agg.downlink.base import DENSE_STEPS, STEPS
from dare_agg.downlink.disk.counts_file import CountsFile, create_counts, forget_counts, open_counts
from dare_agg.downlink.grid import VersionGrid, grid_of
from dare_agg.downlink.grid_file import kept_grid
from dare_agg.downlink.kept_files import KEEP_BYTES, REMEDY, check_version, owner_of, trim
from dare_agg.downlink.steps import Step, apply_step, check_chain, read_steps
from dare_agg.downlink.version_source import VersionSource
from dare_agg.errors import BaseMismatchError, DareError, StateError
from dare_agg.files.trust import own_folder
from dare_agg.vectors.model import Arrays, GlobalModel, ModelRef
from dare_agg.vectors.sources import ArraySource
from dare_agg.vectors.tiled import TiledVector

_PAGE_BYTES = 4096
# Bytes a parameter that are kept at least: the counts of four clients.
_KEPT = 8


class ChainReceiver:
    """The client's half of the chain way (`dare_agg.downlink.protocol.Receiver`).

    ``base`` is the run's base as this client has it, None for none; ``base_version`` its name,
    ``verify`` the fingerprint that the version to be received must have, "" for none.
    ``client`` tells the clients of one machine apart. Raises `BaseMismatchError` for another
    base, `StateError` for a folder in which another user could put something or that cannot be
    made.
    """

    def __init__(
        self,
        folder: Path,
        client: str,
        base: GlobalModel | None,
        base_version: str,
        *,
        verify: str = "",
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        for name in (base_version, verify or base_version):
            check_version(name)
        self.base_version, self.verify, self.keep_bytes = base_version, verify, keep_bytes
        self._folder, heads = folder, folder / "heads"
        try:
            own_folder(heads, remedy=REMEDY)
        except OSError as error:
            raise StateError(f"{heads} cannot be made: {error.strerror}; {REMEDY}") from error
        name = f"{owner_of(client)}-{base_version[:16]}"
        self._path, self._dense_path = heads / f"{name}.counts", heads / f"{name}.dense"
        self._lock_path, self._grid_path = heads / f"{name}.lock", heads / f"{name}.grid"
        self._base: GlobalModel | None = None
        self._followed: GlobalModel | None = None
        if base is not None:
            self._take_base(base)

    def have(self) -> str:
        """The version this client holds, its base, or "" for none."""
        if self._base is None:
            return ""
        try:
            with contextlib.ExitStack() as held:
                return self._open(held)[0].version
        except StateError:
            return self.base_version

    def wants_base(self) -> bool:
        return self._base is None

    def adopt(self, arrays: Arrays) -> bool:
        """False: a base of this way lies on disk before anything is received."""
        return False

    def followed(self) -> GlobalModel | None:
        return self._followed

    def receive(self, version: str, payloads: Mapping[str, bytes], arrays: Arrays | None) -> Arrays:
        """As `follow`; the version's arrays, each read when it is looked at."""
        return self.follow(version, payloads).arrays()

    def follow(self, version: str, payloads: Mapping[str, bytes]) -> GlobalModel:
        """Move what is held by the steps of ``payloads`` to ``version``; return it as it lies.

        The model is good to be read until this client moves on. Raises `BaseMismatchError` for
        steps that do not lead from what is held to ``version`` (they are not applied) or to
        another fingerprint than the server's, `StateError` where the disk refuses.
        """
        base = self._known_base()
        self._followed = None
        steps = self._checked(version, payloads)
        if version == self.base_version and not steps:
            self._followed = base
            return base
        with self._locked(), contextlib.ExitStack() as held:
            steps = self._ahead(steps)
            counts = self._at(steps[0].head.parent if steps else version, held)
            if steps:
                self._move(steps, version, *counts)
            model, source = self._placed(version, base, *counts)
            # Open for as long as the model is there.
            weakref.finalize(source, held.pop_all().close)
        self._verify(model, steps)
        own = set(self._path.parent.glob(f"{self._path.stem}.*"))
        trim(self._folder, own, max(self.keep_bytes, _KEPT * base.delta.size))
        self._followed = model
        return model

    # --- steps -----------------------------------------------------------------------------

    def _checked(self, version: str, payloads: Mapping[str, bytes]) -> list[Step]:
        """The steps that came, found to follow each other up to ``version``."""
        try:
            # Slices of a view are no copies.
            sent = (memoryview(payloads.get(name, b"")) for name in (STEPS, DENSE_STEPS))
            steps = read_steps(*sent)  # type: ignore[arg-type]
            for step in steps:
                check_chain(step)
        except DareError as error:
            raise BaseMismatchError(f"version {version[:12]} was not reached: {error}") from error
        names = [step.head.parent for step in steps[1:]] + [version]
        if steps and [step.head.child for step in steps] != names:
            raise BaseMismatchError(
                f"the steps that came do not lead one after another to version {version[:12]}; it "
                "is asked for again"
            )
        return steps

    def _ahead(self, steps: list[Step]) -> list[Step]:
        """Of steps that came, those after the version that is held.

        Where a reply was lost, the server does not know how far this client has come.
        """
        held = self.have()
        for place, step in enumerate(steps):
            if step.head.child == held:
                return steps[place + 1 :]
        return steps

    def _move(self, steps: list[Step], version: str, counts: CountsFile, dense: CountsFile) -> None:
        """Apply the steps in place; what is not moved to the end is forgotten."""
        try:
            for each in (counts, dense):
                each.mark(each.version, dirty=True)
            for step in steps:
                apply_step(step, self._grid, counts, self._dense_grid, dense)  # type: ignore[arg-type]
            for each in (dense, counts):
                each.mark(version)
        except StateError:
            self._forget()
            raise
        except DareError as error:
            self._forget()
            raise BaseMismatchError(f"version {version[:12]} was not reached: {error}") from error

    def _placed(
        self, version: str, base: GlobalModel, counts: CountsFile, dense: CountsFile
    ) -> tuple[GlobalModel, VersionSource]:
        source = VersionSource(_source(base), self._grid, counts, _unmoved(self._path))
        ref, name = base.ref, version if base.dense.size else ""
        named = ModelRef(version, ref.layout, ref.size, name, ref.dense_layout, ref.dense_size)
        dense_values = self._dense_grid.values(base.dense, dense[:])
        return base.placed(TiledVector(source), dense_values, named), source

    def _verify(self, model: GlobalModel, steps: list[Step]) -> None:
        if not self.verify or model.fingerprints.version == self.verify:
            return
        self._forget()
        number = f"round {steps[-1].head.round}" if steps else "an earlier round"
        raise BaseMismatchError(
            f"version {model.ref.version[:12]} of {number} has fingerprint "
            f"{model.fingerprints.version[:12]} here, {self.verify[:12]} at the server; it is "
            "asked for again from the base"
        )

    # --- files -----------------------------------------------------------------------------

    def _at(self, version: str, held: contextlib.ExitStack) -> tuple[CountsFile, CountsFile]:
        """The counts of ``version``, to be moved; raises `BaseMismatchError` where it is not held.

        From the base on they begin anew.
        """
        if version != self.base_version:
            try:
                counts = self._open(held)
                if counts[0].version == version:
                    return counts
                said = f"it holds {counts[0].version[:12]}"
            except StateError as error:
                said = str(error)
            self._forget()
            raise BaseMismatchError(
                f"version {version[:12]} is not in this client's cache ({said}); it is asked for "
                "again"
            )
        self._forget()
        base = self._known_base()
        counts_of = create_counts(self._path, base.delta.size, self.base_version)
        held.callback(counts_of.close)
        dense = create_counts(self._dense_path, base.dense.size, self.base_version)
        held.callback(dense.close)
        return counts_of, dense

    def _open(self, held: contextlib.ExitStack) -> tuple[CountsFile, CountsFile]:
        """Both groups' counts; raises `StateError` unless they are whole and of one version."""
        base = self._known_base()
        found = []
        for path, size in ((self._path, base.delta.size), (self._dense_path, base.dense.size)):
            counts = open_counts(path, size, self.base_version)
            held.callback(counts.close)
            if counts.dirty:
                raise StateError(f"counts {path} were left while they were being moved")
            found.append(counts)
        if found[0].version != found[1].version:
            raise StateError(
                f"counts {self._path} and those of the dense group are of two versions"
            )
        return found[0], found[1]

    def _take_base(self, base: GlobalModel) -> None:
        if base.ref.version != self.base_version:
            raise BaseMismatchError(
                f"this client's base has fingerprint {base.ref.version[:12]}, the run's is "
                f"{self.base_version[:12]}; give the base that the run began with"
            )
        self._base = base
        self._grid = kept_grid(self._grid_path, base, self.base_version)
        groups = base.groups
        self._dense_grid: VersionGrid = grid_of(groups.dense_layout, base.dense, groups.dtypes)

    def _known_base(self) -> GlobalModel:
        if self._base is None:
            raise BaseMismatchError(
                f"base {self.base_version[:12]} of the run is not on this machine; fetch it and "
                "name its folder (base in the node config)"
            )
        return self._base

    def _forget(self) -> None:
        for path in (self._path, self._dense_path):
            forget_counts(path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Two processes of one client do not move its counts at the same time."""
        try:
            file = self._lock_path.open("ab")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise StateError(f"{self._lock_path}: {error.strerror or error}; {REMEDY}") from error
        with file:
            yield


def _source(base: GlobalModel) -> Any:
    return base.delta.source if isinstance(base.delta, TiledVector) else ArraySource(base.delta)


def _unmoved(path: Path) -> Callable[[], None]:
    """A check that the counts of a file are those that it holds now.

    Whoever moves them says so first, so that what was read before is whole.
    """
    file = path.open("rb", buffering=0)
    page = file.read(_PAGE_BYTES)

    def check() -> None:
        file.seek(0)
        if file.read(_PAGE_BYTES) != page:
            raise BaseMismatchError(
                "this client's version has moved on while it was being read: another process "
                "follows the run under the same client's name (client-name in the node config)"
            )

    return check
