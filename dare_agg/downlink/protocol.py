"""How the global model reaches the clients: a small protocol, and the plain way.

The server's half (`Downlink`) decides what becomes of a step (it may round it to a grid and
keep the rest) and what a client that holds a given version must be sent. The client's half
(`Receiver`) turns that into the model's full arrays. Both are free of Flower; the strategy
and the mod carry the payloads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dare_agg.codec.mask import DropRate
from dare_agg.codec.rates import TensorRates
from dare_agg.errors import BaseMismatchError
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.model import Arrays, GlobalModel


@dataclass(frozen=True)
class Broadcast:
    """What one client is sent: the full arrays, or payloads its receiver understands.

    ``holds`` is the version that it certainly holds from then on, "" for none: whoever did not
    get this says so, and who is only late is not sent the same twice.
    """

    full: bool = True
    payloads: Mapping[str, bytes] = field(default_factory=dict)
    holds: str = ""


class DrawnMask(Protocol):
    """The mask of a round's update, to be drawn again; a `RoundPlan` is one."""

    @property
    def round(self) -> int:
        """The round in which the mask was drawn, from 1."""

    @property
    def mask(self) -> str:
        """The kind of mask, one of `dare_agg.codec.mask.MASK_KINDS`."""

    @property
    def drop_rate(self) -> DropRate:
        """The share p that the mask drops."""

    @property
    def mask_key(self) -> bytes:
        """The 16 bytes that all masks of a round are drawn from."""

    @property
    def rank(self) -> int:
        """The client's rank, which rotates its mask away from the others'."""

    @property
    def rates(self) -> TensorRates | None:
        """The keep rates of each tensor, where they have their own."""


@dataclass(frozen=True)
class SharedMask:
    """The one mask of a round in which all share it."""

    round: int
    drop_rate: DropRate
    mask_key: bytes
    mask: str = "stratified"
    rank: int = 0
    rates: TensorRates | None = None


class Downlink(Protocol):
    """The server's half. ``name`` tells clients which receiver to use."""

    @property
    def name(self) -> str: ...

    def start(self, model: GlobalModel) -> GlobalModel:
        """Take over the model a run starts or resumes with; returns what clients will hold."""

    def advance(
        self,
        model: GlobalModel,
        step: FloatVector,
        dense_step: FloatVector | None,
        plans: Sequence[DrawnMask],
    ) -> GlobalModel:
        """Return the model after a round; ``plans`` hold the masks of the accepted updates."""

    def broadcast(self, model: GlobalModel, have: str) -> Broadcast:
        """Return what brings a client from version ``have`` ("" for none) to ``model``."""

    def facts(self) -> Mapping[str, str]:
        """What every order says of the versions that clients keep; nothing where they keep none."""

    def state_arrays(self) -> Mapping[str, np.ndarray]:
        """All that a restart needs besides base and model, as named arrays."""

    def restore(self, base: GlobalModel, arrays: Mapping[str, np.ndarray]) -> GlobalModel:
        """Take up `state_arrays` again over the run's base; returns the model they belong to."""


class Receiver(Protocol):
    """The client's half: says what it holds, and makes full arrays of what it is sent."""

    def have(self) -> str:
        """The version this client could start from, "" for none."""

    def wants_base(self) -> bool:
        """Whether a base that this client makes by itself would spare it the way."""

    def adopt(self, arrays: Arrays) -> bool:
        """Keep a base that this client has from elsewhere; False when it is another one."""

    def receive(self, version: str, payloads: Mapping[str, bytes], arrays: Arrays | None) -> Arrays:
        """Return the full arrays of ``version``; raises `BaseMismatchError` when it cannot.

        ``arrays`` are the full arrays where the broadcast held them. After an error the
        server sends the same version again as if this client held none.
        """

    def followed(self) -> GlobalModel | None:
        """The version received last, where it lies on disk; None where its arrays are it."""


@dataclass(frozen=True)
class FullDownlink:
    """Every client gets the full arrays every time, as with Flower's FedAvg."""

    name: str = "full"

    def start(self, model: GlobalModel) -> GlobalModel:
        return model

    def advance(
        self,
        model: GlobalModel,
        step: FloatVector,
        dense_step: FloatVector | None,
        plans: Sequence[DrawnMask],
    ) -> GlobalModel:
        return model.moved(step, dense_step)

    def broadcast(self, model: GlobalModel, have: str) -> Broadcast:
        return Broadcast()

    def facts(self) -> Mapping[str, str]:
        return {}

    def state_arrays(self) -> Mapping[str, np.ndarray]:
        return {}

    def restore(self, base: GlobalModel, arrays: Mapping[str, np.ndarray]) -> GlobalModel:
        return base


@dataclass(frozen=True)
class FullReceiver:
    """Takes the full arrays as they came and keeps nothing."""

    def have(self) -> str:
        return ""

    def wants_base(self) -> bool:
        return False

    def adopt(self, arrays: Arrays) -> bool:
        return False

    def followed(self) -> None:
        return None

    def receive(self, version: str, payloads: Mapping[str, bytes], arrays: Arrays | None) -> Arrays:
        if arrays is None:
            raise BaseMismatchError(
                f"version {version[:12]} came without arrays; this client keeps no versions"
            )
        return arrays
