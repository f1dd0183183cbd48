"""Several deltas as the rows of one matrix, read piece by piece: their survivors, side by side.

Under one shared mask the same elements of all deltas survive, so the rows are as long as one update
and nothing is said of the rest, which is zero in all of them. Deltas that list no survivors are
read whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.update import Update
from dare_agg.errors import MergeError
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.one_thread import one_blas_thread
from dare_agg.vectors.sources import DeltaSource, Positions, listed, survivors_of

Matrix = NDArray[np.float64]
# Survivors of each row that are read at once, and elements that are worked on at once: both bound
# memory, and decide in which order products are added.
_READ, _BLOCK = 1 << 16, 1 << 12


@dataclass(frozen=True)
class Rows:
    """The deltas of a round as rows, in the order of their clients.

    Raises `MergeError` for none, and for deltas of several sizes; reading raises it where deltas
    list other survivors.
    """

    sources: Sequence[DeltaSource]

    def __post_init__(self) -> None:
        sizes = {source.size for source in self.sources}
        if len(sizes) != 1:
            raise MergeError(
                f"{len(self.sources)} deltas of sizes {sorted(sizes)}; at least one is needed, all "
                "of one size"
            )

    @property
    def size(self) -> int:
        """Elements of each delta."""
        return self.sources[0].size

    @property
    def sparse(self) -> bool:
        """Whether all deltas list their survivors."""
        return all(hasattr(source, "sparse") for source in self.sources)

    @property
    def survivors(self) -> int:
        """How many elements of each row are listed."""
        return survivors_of(self.sources[0]) if self.sparse else self.size

    def pieces(self, lo: int, hi: int) -> Iterator[tuple[Positions, NDArray[np.float32]]]:
        """Yield ``(positions, values)`` of the survivors in ``[lo, hi)``, a row a delta.

        The arrays may be reused by the next step.
        """
        if not self.sparse:
            values = np.empty((len(self.sources), hi - lo), np.float32)
            for row, source in zip(values, self.sources, strict=True):
                source.read(lo, hi, row)
            yield np.arange(lo, hi, dtype=np.int64), values
            return
        updates = _of_one_mask(self.sources)
        if updates is not None:
            for number, positions, scale in updates[0].mask.within(lo, hi):
                values = np.empty((len(updates), positions.size), np.float32)
                for row, update in zip(values, updates, strict=True):
                    row[:] = update.values(number, number + positions.size)
                    if update.spec.rescale:
                        row *= scale
                yield positions, values
            return
        first = listed(self.sources[0], lo, hi)
        others = [listed(source, lo, hi) for source in self.sources[1:]]
        for mine, *theirs in zip_longest(first, *others):
            yield self._side_by_side(mine, theirs)

    def _side_by_side(
        self,
        first: tuple[Positions, FloatVector] | None,
        others: Sequence[tuple[Positions, FloatVector] | None],
    ) -> tuple[Positions, NDArray[np.float32]]:
        if first is None:
            raise _other_masks()
        positions = first[0].copy()
        values = np.empty((len(self.sources), positions.size), np.float32)
        values[0] = first[1]
        for row, piece in zip(values[1:], others, strict=True):
            if piece is None or not np.array_equal(piece[0], positions):
                raise _other_masks()
            row[:] = piece[1]
        return positions, values

    def blocks(self) -> Iterator[Matrix]:
        """Yield all rows in float64, a few thousand survivors at a time."""
        width = max(1, self.size * _READ // max(1, self.survivors))
        for lo in range(0, self.size, width):
            for _, values in self.pieces(lo, min(self.size, lo + width)):
                for at in range(0, values.shape[1], _BLOCK):
                    yield values[:, at : at + _BLOCK].astype(np.float64)

    def products(self) -> Matrix:
        """⟨xᵢ, xⱼ⟩ of all pairs, in float64: O(n²k) for k survivors, in bounded memory."""
        total = np.zeros((len(self.sources),) * 2)
        with one_blas_thread():
            for block in self.blocks():
                total += block @ block.T
        return total


def _of_one_mask(sources: Sequence[DeltaSource]) -> list[Update] | None:
    """The sources, where they are updates of one mask: it is drawn once for all of them."""
    updates = [source for source in sources if isinstance(source, Update)]
    if len(updates) < len(sources):
        return None
    masks = {
        (one.spec.mask, one.spec.mask_key, one.spec.rank, one.spec.drop_rate) for one in updates
    }
    plain = all(one.spec.rates is None and one.survivors == one.mask.survivors for one in updates)
    return updates if plain and len(masks) == 1 else None


def squared_norm(source: DeltaSource) -> float:
    """‖x‖² of one delta, in float64, in bounded memory."""
    blocks = Rows([source]).blocks()
    return math.fsum(float(np.sum(np.square(block))) for block in blocks)


def _other_masks() -> MergeError:
    return MergeError(
        "the updates of a round list other elements: a rule that compares clients needs one mask "
        "and one drop rate for all of them"
    )


def in_blocks(width: int) -> Iterator[slice]:
    """Cut so many columns into blocks that stay in the cache."""
    for at in range(0, width, _BLOCK):
        yield slice(at, min(width, at + _BLOCK))
