"""What a form of version steps is: one row of `dare_agg.downlink.forms.STEP_FORMS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from dare_agg.codec.mask import DropRate, Mask
from dare_agg.codec.rates import RateTable, TensorRates
from dare_agg.downlink.grid import Positions, VersionGrid
from dare_agg.errors import UpdateError
from dare_agg.vectors.layout import FloatVector


@dataclass(frozen=True)
class Family:
    """Masks of one key with consecutive ranks, as the clients of a round drew them."""

    kind: str
    drop_rate: DropRate
    first: int
    ranks: int
    key: bytes
    table: RateTable | None = None

    def masks(self, sizes: Sequence[int]) -> list[Mask]:
        """The masks over the elements of tensors of these sizes, in order of rank.

        Raises `UpdateError` for keep rates of other tensors.
        """
        rates = None
        if self.table is not None:
            if len(self.table.levels) != len(sizes):
                raise UpdateError(
                    f"masks of {len(self.table.levels)} tensors for a model of {len(sizes)}",
                    reason="shape",
                )
            rates = TensorRates(tuple(sizes), self.table, told=True)
        return [
            Mask(self.kind, sum(sizes), self.drop_rate, self.key, rank, rates)
            for rank in range(self.first, self.first + self.ranks)
        ]


Families = tuple[Family, ...]


@dataclass(frozen=True)
class StepHead:
    """Everything of a step but its payloads."""

    form: str
    values: str
    dense_values: str
    round: int
    parent: str
    child: str
    key: bytes
    families: Families = ()
    survivors: int = 0


# Ascending positions, what the change is there, and the whole steps that clients will decode.
Settled = tuple[Positions, FloatVector, Positions]


class StepWriter(Protocol):
    """A step's payload that grows as the change comes, tile by tile of the grid's `TILE`.

    ``count`` is how many values the head says it holds, once all came.
    """

    @property
    def count(self) -> int: ...

    def places(self) -> Positions:
        """Where the form keeps values in the next tile, ascending."""

    def add(self, change: FloatVector) -> Iterator[Settled]:
        """Take the change at these places; yields what is settled by now, in order."""

    def finish(self) -> Iterator[Settled]:
        """End the payload; yields what was not settled yet."""

    def payload(self) -> bytes:
        """The finished payload, as ``encode`` of the form gives it for the whole change."""


@dataclass(frozen=True)
class StepForm:
    """One row: how the change of a group of tensors becomes a payload, and back.

    Attributes
    ----------
    name, code
        the word in heads, the number on the wire.
    encode
        a head and the change, float32 over the grid; returns the payload and how many
        values the head says it holds.
    decode
        a head and a payload; yields ascending positions and whole grid steps, the same at
        both ends. Raises `UpdateError` for a payload that does not fit.
    write
        a head and the grid; returns the writer of a change that comes in tiles.
    masks
        what a step's head names, from the round's masks, the drop rate and the step's key.
    masked
        whether a step without masks cannot be read.
    dense
        the form of the dense group beside it; None for the same.
    """

    name: str
    code: int
    encode: Callable[[StepHead, FloatVector, VersionGrid], tuple[bytes, int]]
    decode: Callable[[StepHead, bytes, VersionGrid], Iterator[tuple[Positions, Positions]]]
    write: Callable[[StepHead, VersionGrid], StepWriter]
    masks: Callable[[Families, DropRate, bytes], Families] = lambda families, rate, key: ()
    masked: bool = False
    dense: StepForm | None = None

    @property
    def of_dense(self) -> StepForm:
        """The dense group's form."""
        return self.dense or self
