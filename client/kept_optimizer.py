"""Moments of the optimizer that a client keeps between rounds, in files of its own.

``<folder>/<client>/<identity>-<round>.safetensors`` holds what the optimizer knew after a round:
``m.NAME`` and ``v.NAME`` (first and second moments of each parameter) and ``step``. The
identity covers the run, its method, the client, and the parameters' names and shapes. A round
begins with the newest file of a round before it, so that one that is trained again (a kill, a
message sent twice) begins as it did; moments stay while the weights move with the server. Two
rounds are kept of a run. A file that is damaged or cannot be written costs the moments, not the
round.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.downlink.kept_files import KEEP_BYTES, forget, owner_of, trim
from dare_agg.errors import DareError, StateError
from dare_agg.files.atomic import replace_file
from dare_agg.files.trust import own_folder, read_own

LOG = logging.getLogger("flwr")
_REMEDY = "name a folder of this user's own (cache in the node config), or set keep-optimizer off"
_ROUNDS = 2
_PARTS = {"m": "exp_avg", "v": "exp_avg_sq"}
Named = Mapping[str, Any]


@dataclass(frozen=True)
class KeptOptimizer:
    """Where a client keeps its moments: its folder, and which round of which run this is."""

    folder: Path
    client: str
    run: tuple[str, ...]
    round: int
    keep_bytes: int = KEEP_BYTES

    def load(self, optimizer: Any, named: Named) -> bool:
        """Give a new optimizer the moments after the newest round before this one.

        Returns whether there were any.
        """
        for number, path in sorted(self._files(named), reverse=True):
            if number >= self.round:
                continue
            try:
                _put(optimizer, named, _read(path, named))
            except (DareError, OSError, ValueError) as error:
                LOG.warning("kept moments of round %d: %s; they begin anew", number, error)
                forget(path)
                return False
            return True
        return False

    def save(self, optimizer: Any, named: Named) -> None:
        """Keep the moments after this round, and no more than this round's and the one before."""
        from safetensors.numpy import save

        home = self.folder / owner_of(self.client)
        path = home / f"{self._identity(named)}-{self.round}.safetensors"
        try:
            own_folder(home, remedy=_REMEDY)
            replace_file(path, (save(_take(optimizer, named)),), mode=0o600)
        except (StateError, OSError) as error:
            LOG.warning("moments of round %d are not kept: %s", self.round, error)
            return
        # What is of later rounds was another start of this run's.
        kept = sorted(n for n, _ in self._files(named) if n <= self.round)[-_ROUNDS:]
        for number, old in self._files(named):
            if number not in kept:
                forget(old)
        trim(self.folder, [path], self.keep_bytes)

    def _files(self, named: Named) -> list[tuple[int, Path]]:
        identity = self._identity(named)
        found = []
        with contextlib.suppress(OSError):
            for path in (self.folder / owner_of(self.client)).glob(f"{identity}-*.safetensors"):
                with contextlib.suppress(ValueError):
                    found.append((int(path.stem.rpartition("-")[2]), path))
        return found

    def _identity(self, named: Named) -> str:
        shapes = [[name, list(p.shape)] for name, p in named.items()]
        what = json.dumps([*self.run, self.client, shapes])
        return hashlib.sha256(what.encode()).hexdigest()[:32]


def _take(optimizer: Any, named: Named) -> dict[str, NDArray[Any]]:
    """The moments of every parameter that has some, on the host."""
    found: dict[str, NDArray[Any]] = {}
    for name, parameter in named.items():
        state = optimizer.state.get(parameter)
        if not state:  # not part of any loss so far
            continue
        for part, key in _PARTS.items():
            found[f"{part}.{name}"] = state[key].detach().float().cpu().numpy()
        found["step"] = np.array([float(state["step"])], np.float32)
    return found


def _read(path: Path, named: Named) -> dict[str, NDArray[Any]]:
    """The moments of a file; raises `StateError` for what no optimizer of these has."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        found = load(read_own(path, remedy=_REMEDY))
    except SafetensorError as error:
        raise StateError(f"{path.name} is damaged ({error})") from error
    step = found.get("step")
    right = step is not None and step.shape == (1,) and step.dtype == np.float32 and step[0] >= 1
    for key, array in found.items():
        if key == "step":
            continue
        part, _, name = key.partition(".")
        right = right and part in _PARTS and name in named
        right = right and array.shape == tuple(named[name].shape) and array.dtype == np.float32
        right = right and bool(np.isfinite(array).all()) and (part == "m" or array.min() >= 0)
        right = right and all(f"{other}.{name}" in found for other in _PARTS)
    if not right:
        raise StateError(f"{path.name} holds no moments of these parameters")
    return found


def _put(optimizer: Any, named: Named, found: Mapping[str, NDArray[Any]]) -> None:
    import torch

    # Not by load_state_dict, which would give moments the parameter's own precision.
    for name, parameter in named.items():
        if f"m.{name}" in found:
            moments = {
                key: torch.tensor(found[f"{part}.{name}"], device=parameter.device)
                for part, key in _PARTS.items()
            }
            step = torch.tensor(float(found["step"][0]), device=parameter.device)
            optimizer.state[parameter] = {"step": step, **moments}
