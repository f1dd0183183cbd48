"""Counts of grid steps in a file: two bytes a parameter and the bits they need beyond, in place.

The low 16 bits of every count, signed, lie in a mapped file. What is above, count = low + 2¹⁶·high,
stands in a second file, ``<name>.high``, in as many bits as the counts around need
(`dare_agg.downlink.disk.sparse_bits`; -1, 1, -2 … are 1, 2, 3 … there). All are read and written
where they lie; a process's own memory holds the part that is looked at.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dare_agg.downlink.disk.mapped import MappedVector, create_mapped, open_mapped
from dare_agg.downlink.disk.sparse_bits import Bits, SparseBits, create_sparse
from dare_agg.downlink.grid import Counts, Positions

_KIND, _ABOVE = "counts", "counts.high"
Highs = NDArray[np.int16]


class CountsFile:
    """Counts of ``size`` parameters, to be indexed like an int32 vector by slices and positions.

    Make one with `create_counts` or `open_counts`, and close it. ``version`` is what the file
    says it holds, a name of 64 hex digits; ``dirty`` whether it is being moved to another one.
    """

    dtype = np.dtype(np.int32)

    def __init__(self, low: MappedVector) -> None:
        self.path, self.size, self.base = low.path, low.size, low.base
        self._low = low
        self._high = SparseBits(_high(self.path), _ABOVE, self.size, self.base)

    @property
    def version(self) -> str:
        """The version that the file says it holds, or is being moved from."""
        return self._low.version

    @property
    def dirty(self) -> bool:
        """Whether the counts were being moved when the file was last let go of."""
        return self._low.dirty

    @property
    def shape(self) -> tuple[int, ...]:
        """As a vector's."""
        return (self.size,)

    @property
    def widened(self) -> bool:
        """Whether any count may have left 16 bits."""
        return not self._high.empty

    def __getitem__(self, where: slice | Positions) -> Counts:
        """A copy of the counts of a run, or at ascending positions, int32."""
        low, high = self.halves(where)
        counts = low.astype(np.int32)
        if high is not None:
            counts += high.astype(np.int32) << 16
        return counts

    def __setitem__(self, where: slice | Positions, counts: NDArray[np.signedinteger]) -> None:
        low, high = halves_of(counts)
        self.put_halves(where, low, high)

    def halves(self, where: slice | Positions) -> tuple[NDArray[np.int16], Highs | None]:
        """The low 16 bits, signed, and what is above, None where that is 0 for certain (copies)."""
        where, passed = self._reach(where)
        low = np.array(self._low.values[where])
        self._low.passed(passed)
        return low, _signed(self._high.read(where))

    def put_halves(
        self, where: slice | Positions, low: NDArray[np.int16], high: Highs | None
    ) -> None:
        """Write what `halves` gives; raises `StateError` where the disk is full."""
        where, _ = self._reach(where)
        self.replace_halves(where, _signed(self._high.read(where)), low, high)

    def replace_halves(
        self,
        where: slice | Positions,
        was: Highs | None,
        low: NDArray[np.int16],
        high: Highs | None,
    ) -> None:
        """As `put_halves`, where what is above is known: what `halves` has just given."""
        where, passed = self._reach(where)
        # First what may find no room.
        self._high.write(where, _unsigned(was), _unsigned(high))
        self._low.values[where] = low
        self._low.passed(passed)

    def mark(self, version: str, *, dirty: bool = False) -> None:
        """Have the counts on the disk, then say which version they are, or are being moved from.

        ``dirty`` comes first and is taken back last: a file that says it was not whole whenever
        something happened in between. Raises `StateError` where the disk refuses.
        """
        self._high.flush()
        self._low.mark(version, dirty=dirty)

    def flush(self) -> None:
        """Have on the disk what was written; raises `StateError` where that fails."""
        self._high.flush()
        self._low.flush()

    def close(self) -> None:
        """Let go of the files; what was written stays written."""
        self._low.close()
        self._high.close()

    def __enter__(self) -> CountsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _reach(self, where: slice | Positions) -> tuple[slice | Positions, int]:
        """The places with plain bounds, and how many counts they reach over."""
        if not isinstance(where, slice):
            return where, int(where[-1] - where[0]) + 1 if where.size else 0
        lo, hi, step = where.indices(self.size)
        if step != 1:
            raise ValueError(f"slice with step {step}; counts are read in runs")
        return slice(lo, max(lo, hi)), max(0, hi - lo)


def create_counts(path: Path, size: int, base: str, version: str = "") -> CountsFile:
    """Make a file of zeros over the base of this name, in place of what is at ``path``.

    All its room is taken at once, so that a full disk is met here. Raises `StateError`.
    """
    low = create_mapped(path, _KIND, "<i2", size, base, version)
    try:
        create_sparse(_high(path), _ABOVE, size, base)
        return CountsFile(low)
    except BaseException:
        low.close()
        forget_counts(path)
        raise


def open_counts(path: Path, size: int, base: str) -> CountsFile:
    """Open the file at ``path``; nothing is changed.

    Raises `StateError` for one that is missing, cut off, damaged, or of another base.
    """
    low = open_mapped(path, _KIND, "<i2", size, base)
    try:
        return CountsFile(low)
    except BaseException:
        low.close()
        raise


def forget_counts(path: Path) -> None:
    """Remove a file of counts, whole or not; one that is not there is forgotten already."""
    for name in (path, _high(path)):
        with contextlib.suppress(OSError):
            name.unlink(missing_ok=True)


def halves_of(counts: NDArray[np.signedinteger]) -> tuple[NDArray[np.int16], Highs | None]:
    """The low 16 bits of int32 counts, signed, and what is above, None where that is 0."""
    low = counts.astype(np.int16)
    above = counts - low
    if not above.any():
        return low, None
    above >>= 16
    return low, above.astype(np.int16)


def _high(path: Path) -> Path:
    return path.with_name(path.name + ".high")


def _unsigned(high: Highs | None) -> Bits | None:
    """0, -1, 1, -2 … as 0, 1, 2, 3 …: small numbers of either sign have few bits."""
    if high is None:
        return None
    return ((high << 1) ^ (high >> 15)).view(np.uint16)


def _signed(bits: Bits | None) -> Highs | None:
    if bits is None:
        return None
    high = (bits >> 1).view(np.int16)
    high ^= -(bits & 1).view(np.int16)
    return high
