"""The client's copy of the global model: the base and whole grid steps, in files.

``<folder>/bases/<version>.safetensors`` is a base, shared by the clients of a machine;
``<folder>/heads/<client>-<base>.state`` is the version a client holds of it, as counts of
grid steps. A file that is not whole counts as none, and what is missing is asked for again.
The folder's size is bounded: bases and heads that were not used for longest go first.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.downlink.base import BASE, DENSE_STEPS, STEPS, read_order, write_base
from dare_agg.downlink.grid import Counts, grid_of
from dare_agg.downlink.kept_files import (
    KEEP_BYTES,
    REMEDY,
    check_version,
    forget,
    is_version,
    owner_of,
    trim,
    try_to,
)
from dare_agg.downlink.protocol import FullReceiver
from dare_agg.downlink.steps import apply_step, read_steps
from dare_agg.errors import BaseMismatchError, DareError, StateError
from dare_agg.files.atomic import replace_file
from dare_agg.files.json_text import parse_json
from dare_agg.files.safetensors_header import check_safetensors, header_length, parse_header
from dare_agg.files.state_file import read_state, write_state
from dare_agg.files.trust import own_folder
from dare_agg.vectors.model import Arrays, GlobalModel, global_model


class VersionReceiver:
    """The client's half of the version downlink (`dare_agg.downlink.protocol.Receiver`).

    ``base`` names the base of the run; ``dense``, ``exclude``, ``by_form`` and ``apart`` are what
    its groups were made with, ``client`` tells the clients of one machine apart. Raises
    `StateError` for a folder in which another user could put something.
    """

    def __init__(
        self,
        folder: Path,
        client: str,
        base: str,
        *,
        dense: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
        by_form: bool = False,
        apart: tuple[str, ...] = (),
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        check_version(base)
        self.base, self.keep_bytes, self._folder = base, keep_bytes, folder
        for part in ("bases", "heads"):
            # Where it cannot be made, nothing is kept.
            with contextlib.suppress(OSError):
                own_folder(folder / part, remedy=REMEDY)
        self._groups: dict[str, Any] = {
            "dense": dense,
            "exclude": exclude,
            "by_form": by_form,
            "apart": apart,
        }
        self._base_path = folder / "bases" / f"{base}.safetensors"
        self._head_path = folder / "heads" / f"{owner_of(client)}-{base[:16]}.state"

    def have(self) -> str:
        """The version this client holds, its base, or "" for none."""
        if not self._base_path.is_file():
            return ""
        try:
            return _head_version(self._head_path)
        except StateError:
            return self.base

    def wants_base(self) -> bool:
        return not self.have()

    def adopt(self, arrays: Arrays) -> bool:
        """Keep a base that this client has from elsewhere; False when it is another one."""
        if global_model(arrays, **self._groups).ref.version != self.base:
            return False
        self._store_base(write_base(arrays))
        return True

    def followed(self) -> None:
        return None

    def receive(self, version: str, payloads: Mapping[str, bytes], arrays: Arrays | None) -> Arrays:
        """Follow the steps to ``version``, check its fingerprint, keep it, return its arrays.

        Where nothing can be written (full disk, read-only folder) the arrays are returned all
        the same, and what could not be kept is sent again next time.

        Raises `BaseMismatchError` for steps that do not lead from what is held to ``version``.
        """
        if not payloads and arrays is not None:
            return FullReceiver().receive(version, payloads, arrays)
        if BASE in payloads:
            forget(self._head_path)
            try_to(lambda: self._store_base(payloads[BASE]))
        base = self._load_base(payloads.get(BASE))
        groups = base.groups
        grid = grid_of(groups.layout, base.delta, groups.dtypes)
        dense_grid = grid_of(groups.dense_layout, base.dense, groups.dtypes)
        steps = read_steps(payloads.get(STEPS, b""), payloads.get(DENSE_STEPS, b""))
        held = self.have()
        for place, step in enumerate(steps):
            # A reply that was lost: the server does not know how far this client has come.
            if step.head.child == held:
                steps = steps[place + 1 :]
                break
        start = steps[0].head.parent if steps else version
        counts, dense_counts = self._load_head(start, base)
        try:
            for place, step in enumerate(steps):
                if place and step.head.parent != steps[place - 1].head.child:
                    raise BaseMismatchError("the steps that came do not follow each other")
                apply_step(step, grid, counts, dense_grid, dense_counts)
            model = base.placed(
                grid.values(base.delta[:], counts), dense_grid.values(base.dense, dense_counts)
            )
        except DareError as error:
            forget(self._head_path)
            raise BaseMismatchError(f"version {version[:12]} was not reached: {error}") from error
        if model.ref.version != version:
            forget(self._head_path)
            raise BaseMismatchError(
                f"the steps led to {model.ref.version[:12]}, {version[:12]} was announced; the "
                "version is asked for again"
            )
        if steps or not self._head_path.is_file():
            held_now = {"counts": counts, "dense-counts": dense_counts}
            facts = {"version": version, "base": self.base}
            try_to(lambda: write_state(self._head_path, held_now, facts))
        trim(self._folder, {self._base_path, self._head_path}, self.keep_bytes)
        return model.arrays()

    # --- files -----------------------------------------------------------------------------

    def _store_base(self, payload: bytes) -> None:
        if not self._base_path.is_file() or self._base_path.stat().st_size != len(payload):
            replace_file(self._base_path, (payload,))

    def _load_base(self, sent: bytes | None = None) -> GlobalModel:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            data = self._base_path.read_bytes() if sent is None else sent
            order = read_order(check_safetensors(data)["order"])
            arrays = load(data)
            model = global_model({name: arrays[name] for name in order}, **self._groups)
            found = model.ref.version
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
            forget(self._base_path)
            raise BaseMismatchError(
                f"base {self.base[:12]} cannot be read from the cache "
                f"({type(error).__name__}); it is asked for again"
            ) from error
        if found != self.base:
            forget(self._base_path)
            raise BaseMismatchError(
                f"the cached base has fingerprint {found[:12]}, not {self.base[:12]}; it is "
                "asked for again"
            )
        with contextlib.suppress(OSError):
            os.utime(self._base_path)
        return model

    def _load_head(self, version: str, base: GlobalModel) -> tuple[Counts, Counts]:
        if version == self.base:
            return np.zeros(base.delta.size, np.int32), np.zeros(base.dense.size, np.int32)
        try:
            arrays, facts = read_state(self._head_path)
            if facts["version"] != version:
                raise StateError(f"it holds version {str(facts['version'])[:12]!r}")
            counts, dense_counts = arrays["counts"], arrays["dense-counts"]
            fits = counts.shape == base.delta.shape and dense_counts.shape == base.dense.shape
            if not fits or counts.dtype != np.int32 or dense_counts.dtype != np.int32:
                raise StateError("it is of another model")
            return counts, dense_counts
        except (StateError, KeyError) as error:
            forget(self._head_path)
            raise BaseMismatchError(
                f"version {version[:12]} is not in this client's cache ({error}); it is asked "
                "for again"
            ) from error


def _head_version(path: Path) -> str:
    """The version of a head without reading its counts; the checksum is looked at when used."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
            size, header = struct.unpack_from("<QQ", head, 8)
            if path.stat().st_size != 16 + size + 32 or header > size:
                raise StateError(f"{path} is cut off")
            tensors = path.stat().st_size - 16 - 8 - header - 32
            metadata = parse_header(file.read(header_length(head[16:], size)), tensors)[1]
            version = parse_json(metadata["facts"])["version"]
            if not isinstance(version, str) or not is_version(version):
                raise StateError(f"{path} holds no version")
            return version
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} holds no version") from error
