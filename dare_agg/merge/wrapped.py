"""Where deltas come from: anything that can be read tile by tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dare_agg.codec.mask import Mask
from dare_agg.errors import MergeError
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource, Positions, listed, survivors_of, take


@dataclass(frozen=True)
class MaskedSource:
    """A delta under a random mask: DARE with ``rescale``, else DropOnly."""

    source: DeltaSource
    mask: Mask
    rescale: bool = True

    @property
    def size(self) -> int:
        return self.source.size

    @property
    def survivors(self) -> int:
        return self.mask.survivors

    def sparse(self, lo: int, hi: int) -> Iterator[tuple[Positions, FloatVector]]:
        for _, positions, scale in self.mask.within(lo, hi):
            values = take(self.source, positions)
            if self.rescale:
                values *= scale
            yield positions, values

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        out[:] = 0
        for positions, values in self.sparse(lo, hi):
            out[positions - lo] = values


@dataclass(frozen=True)
class PiecewiseSource:
    """A delta that another source gives in each of its ``pieces`` [first, stop); None is zero.

    ``survivors`` says how many elements are listed in all.
    """

    pieces: Sequence[tuple[int, int, DeltaSource | None]]
    survivors: int

    @property
    def size(self) -> int:
        return self.pieces[-1][1] if self.pieces else 0

    def sparse(self, lo: int, hi: int) -> Iterator[tuple[Positions, FloatVector]]:
        for source, a, b in self._within(lo, hi):
            if isinstance(source, MaskedSource):
                yield from source.sparse(a, b)
            elif source is not None:
                values = np.empty(b - a, np.float32)
                source.read(a, b, values)
                yield np.arange(a, b, dtype=np.int64), values

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        for source, a, b in self._within(lo, hi):
            if source is None:
                out[a - lo : b - lo] = 0
            else:
                source.read(a, b, out[a - lo : b - lo])

    def _within(self, lo: int, hi: int) -> Iterator[tuple[DeltaSource | None, int, int]]:
        for start, stop, source in self.pieces:
            if start < hi and stop > lo:
                yield source, max(lo, start), min(hi, stop)


@dataclass(frozen=True)
class TrimmedSource:
    """A delta without its entries of \\|x\\| ≤ a threshold for each span (magnitude drop)."""

    source: DeltaSource
    spans: Sequence[tuple[int, int]]
    thresholds: FloatVector

    @property
    def size(self) -> int:
        return self.source.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        self.source.read(lo, hi, out)
        for (start, stop), threshold in zip(self.spans, self.thresholds, strict=True):
            if start < hi and stop > lo:
                piece = out[max(lo, start) - lo : min(hi, stop) - lo]
                piece *= np.abs(piece) > threshold


@dataclass(frozen=True)
class ScaledSource:
    """A delta with one factor for each span (mergekit's L1 rescale)."""

    source: DeltaSource
    spans: Sequence[tuple[int, int]]
    factors: FloatVector

    @property
    def size(self) -> int:
        return self.source.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        self.source.read(lo, hi, out)
        for (start, stop), factor in zip(self.spans, self.factors, strict=True):
            if start < hi and stop > lo:
                out[max(lo, start) - lo : min(hi, stop) - lo] *= factor


@dataclass(frozen=True)
class FactorSource:
    """A delta times one factor; as sparse as the delta."""

    source: DeltaSource
    factor: float

    @property
    def size(self) -> int:
        return self.source.size

    @property
    def survivors(self) -> int:
        return survivors_of(self.source)

    def sparse(self, lo: int, hi: int) -> Iterator[tuple[Positions, FloatVector]]:
        for positions, values in listed(self.source, lo, hi):
            yield positions, values * np.float32(self.factor)

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        self.source.read(lo, hi, out)
        out *= np.float32(self.factor)


@dataclass(frozen=True)
class SumSource:
    """Σ share·delta of several deltas, added in their order."""

    sources: Sequence[DeltaSource]
    shares: Sequence[float]

    def __post_init__(self) -> None:
        sizes = {source.size for source in self.sources}
        if len(sizes) != 1 or len(self.sources) != len(self.shares):
            raise MergeError(
                f"{len(self.sources)} deltas of sizes {sorted(sizes)} with {len(self.shares)} "
                "shares; deltas of one size and a share each are needed"
            )

    @property
    def size(self) -> int:
        return self.sources[0].size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        out[:] = 0
        row = np.empty(hi - lo, np.float32)
        for source, share in zip(self.sources, self.shares, strict=True):
            source.read(lo, hi, row)
            row *= np.float32(share)
            out += row


@dataclass(frozen=True)
class NamedSource:
    """Named arrays over a layout; absent names read as 0 (Fisher values)."""

    entries: Sequence[tuple[int, int, FloatVector | None]]

    @property
    def size(self) -> int:
        return self.entries[-1][1] if self.entries else 0

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        for start, stop, array in self.entries:
            if start < hi and stop > lo:
                a, b = max(lo, start), min(hi, stop)
                out[a - lo : b - lo] = 0 if array is None else array[a - start : b - start]
