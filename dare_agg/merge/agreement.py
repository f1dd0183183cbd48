"""Which elements of a delta several models speak for, counted while a merge reads them.

Sources are wrapped: the first time a tile's part of one is read or listed, its signs are
counted, so a second look costs no second decoding and nothing is kept but a byte an element.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.merge.task import Scratch, is_sparse
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource, Positions, listed, survivors_of

# An element's byte: how many entries are positive (low half) and negative (high half), 2 for
# more than one.
_POSITIVE, _NEGATIVE = np.uint8(0x03), np.uint8(0x30)
_CARRY = np.uint8(0x11)


class _Tile(threading.local):
    """The tile that a thread is at, and how far each source has been counted in it."""

    lo = hi = 0
    scratch: Scratch
    counts: NDArray[np.uint8]
    reached: list[int]


class Agreement:
    """Counts the entries of ``sources``, element by element, a tile at a time.

    A thread calls `begin`, reads from `observed` what it likes (in ascending pieces), and gets
    the tile's figures from `finish`, which reads what was left out.
    """

    def __init__(self, sources: Sequence[DeltaSource]) -> None:
        self._sources = tuple(sources)
        self._listed = all(map(is_sparse, sources))
        self._tile = _Tile()

    @property
    def observed(self) -> tuple[DeltaSource, ...]:
        """The sources, each telling this agreement what it yields.

        They hold it, and it does not hold them: nothing of a merge waits to be collected.
        """
        return tuple(_Observed(s, i, self) for i, s in enumerate(self._sources))

    def begin(self, lo: int, hi: int, scratch: Scratch) -> None:
        """Start the tile [lo, hi) in this thread; its counts live in ``scratch``."""
        tile = self._tile
        tile.lo, tile.hi, tile.scratch = lo, hi, scratch
        tile.counts = scratch.get("agreement", hi - lo, np.uint8)
        tile.counts[:] = 0
        tile.reached = [lo] * len(self._sources)

    def finish(self) -> tuple[int, int, int]:
        """Return how many elements have an entry, exactly one, and entries of both signs."""
        tile = self._tile
        lo, hi = tile.lo, tile.hi
        for source, first in zip(self.observed, list(tile.reached), strict=True):
            if first == hi:
                continue
            if self._listed:
                for _ in listed(source, first, hi):
                    pass
            else:
                source.read(first, hi, tile.scratch.get("row", hi - first))
        tile.lo = tile.hi = 0
        counts, flag = tile.counts, tile.scratch.get("flag", hi - lo, np.bool_)
        bits = flag.view(np.uint8)
        touched = int(np.count_nonzero(counts))
        lone = sum(int(np.count_nonzero(np.equal(counts, one, out=flag))) for one in (0x01, 0x10))
        positive = int(np.count_nonzero(np.bitwise_and(counts, _POSITIVE, out=bits)))
        negative = int(np.count_nonzero(np.bitwise_and(counts, _NEGATIVE, out=bits)))
        return touched, lone, positive + negative - touched

    def wants(self, number: int, lo: int, hi: int) -> bool:
        """Whether a source's part is the next to be counted in this thread's tile."""
        tile = self._tile
        return hi <= tile.hi and lo < hi and tile.reached[number] == lo

    def count_row(self, number: int, lo: int, hi: int, row: FloatVector) -> None:
        """Count source ``number``'s non-zero elements of [lo, hi), read as a whole ``row``."""
        tile = self._tile
        counts = tile.counts[lo - tile.lo : hi - tile.lo]
        counts += _entries(row, tile.scratch)
        _saturate(counts, tile.scratch)
        tile.reached[number] = hi

    def count_listed(self, positions: Positions, values: FloatVector) -> None:
        """Count the non-zero ``values`` that a source listed at ``positions`` of the vector."""
        tile = self._tile
        at = positions - tile.lo
        counts = tile.counts.take(at)
        counts += _entries(values, tile.scratch)
        _saturate(counts, tile.scratch)
        tile.counts[at] = counts

    def reached(self, number: int, hi: int) -> None:
        """Note that a source has been counted up to ``hi``."""
        self._tile.reached[number] = hi


def _entries(values: FloatVector, scratch: Scratch) -> NDArray[np.uint8]:
    """1 for a positive value, 16 for a negative one, 0 for zero."""
    above = scratch.get("above", values.size, np.bool_)
    below = scratch.get("below", values.size, np.bool_)
    np.greater(values, 0, out=above)
    np.less(values, 0, out=below)
    entries = below.view(np.uint8)
    entries <<= 4
    entries |= above.view(np.uint8)
    return entries


def _saturate(counts: NDArray[np.uint8], scratch: Scratch) -> None:
    """Make each 3 a 2."""
    carry = scratch.get("carry", counts.size, np.uint8)
    np.right_shift(counts, 1, out=carry)
    carry &= counts
    carry &= _CARRY
    counts -= carry


@dataclass(frozen=True)
class _Observed:
    """A source that tells an `Agreement` what it yields."""

    source: DeltaSource
    number: int
    agreement: Agreement

    @property
    def size(self) -> int:
        return self.source.size

    @property
    def survivors(self) -> int:
        return survivors_of(self.source)

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        self.source.read(lo, hi, out)
        if self.agreement.wants(self.number, lo, hi):
            self.agreement.count_row(self.number, lo, hi, out)

    def sparse(self, lo: int, hi: int) -> Iterator[tuple[Positions, FloatVector]]:
        if not self.agreement.wants(self.number, lo, hi):
            yield from listed(self.source, lo, hi)
            return
        for positions, values in listed(self.source, lo, hi):
            self.agreement.count_listed(positions, values)
            yield positions, values
        self.agreement.reached(self.number, hi)
