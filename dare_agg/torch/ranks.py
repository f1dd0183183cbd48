"""The processes of a sharded model, and what they tell each other: bytes and survivors.

Every function is called by all of them, in the same order. The first one leads: it has the
version and the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from dare_agg.errors import DareError, UpdateError
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource, Positions, take

LEADER = 0


@dataclass(frozen=True)
class Ranks:
    """All processes of the default group; ``device`` is where what they exchange must lie."""

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process has the version and the answer."""
        return self.rank == LEADER

    def share(self, data: bytes = b"") -> bytes:
        """The leader's bytes, at every process."""
        size = int(self._broadcast(np.array([len(data)], np.int64))[0])
        if not size:
            return b""
        room = np.frombuffer(data, np.uint8).copy() if self.leads else np.empty(size, np.uint8)
        return self._broadcast(room).tobytes()

    def fill(self, values: FloatVector) -> None:
        """Overwrite values at every process with the leader's."""
        found = self._broadcast(values)
        if found is not values:
            values[:] = found

    def exchange(self, parcels: Sequence[bytes]) -> list[bytes]:
        """Hand a parcel to each process; return those from each, in their order."""
        sent = np.array([len(parcel) for parcel in parcels], np.int64)
        due = torch.empty(self.count, dtype=torch.int64, device=self.device)
        dist.all_to_all_single(due, self._there(sent))
        sizes = due.cpu().tolist()
        room = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        joined = np.frombuffer(bytearray(b"".join(parcels)), np.uint8)
        dist.all_to_all_single(room, self._there(joined), sizes, sent.tolist())
        found = room.cpu().numpy().tobytes()
        return [found[a:b] for a, b in pairwise(np.cumsum([0, *sizes]))]

    def joined(self, payload: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """At the leader: bytes that were written by one process each, 0 at the others."""
        there = self._there(payload)
        dist.reduce(there, LEADER)
        return there.cpu().numpy()

    def agree(self, error: DareError | None) -> None:
        """Raise the error of the first process that has one, at all of them."""
        word = b"" if error is None else f"{error.reason}\0{error}".encode()
        for said in self.exchange([word] * self.count):
            if error is not None:
                raise error
            if said:
                raise _other(said)

    def told(self, error: DareError | None) -> None:
        """Raise the leader's error, where it has one, at all processes."""
        said = self.share(b"" if error is None else f"{error.reason}\0{error}".encode())
        if error is not None:
            raise error
        if said:
            raise _other(said)

    def _broadcast(self, values: NDArray) -> NDArray:
        there = self._there(values)
        dist.broadcast(there, LEADER)
        return there.cpu().numpy()

    def _there(self, values: NDArray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def all_ranks() -> Ranks:
    """The processes of the default group, which must have been made."""
    plain = "gloo" in str(dist.get_backend_config())
    device = torch.device("cpu" if plain else "cuda")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


@dataclass(frozen=True)
class SharedSource:
    """The leader's source, read by all processes together, in the same parts."""

    ranks: Ranks
    size: int
    own: DeltaSource | None = None

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with the elements ``lo`` to ``hi``; raises as the leader's source."""
        wrong: DareError | None = None
        if self.own is not None:
            try:
                self.own.read(lo, hi, out)
            except DareError as error:
                wrong = error
        self.ranks.told(wrong)
        self.ranks.fill(out)

    def take(self, positions: Positions) -> FloatVector:
        """Return the elements at ascending positions; raises as the leader's source."""
        found = np.empty(positions.size, np.float32)
        wrong: DareError | None = None
        if self.own is not None:
            try:
                found[:] = take(self.own, positions)
            except DareError as error:
                wrong = error
        self.ranks.told(wrong)
        self.ranks.fill(found)
        return found


def _other(said: bytes) -> DareError:
    """Another process's error, as this one raises it."""
    reason, _, text = said.decode().partition("\0")
    return UpdateError(text, reason=reason)
