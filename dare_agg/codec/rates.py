"""Keep rates by tensor: a byte for each says how large its delta is, and all else follows.

At equal bytes an unbiased drop makes the least noise where a tensor is kept in proportion to the
root mean square of its delta, at most wholly (Neyman allocation). So a `RateTable` holds one
**level** a tensor, that root mean square in quarter octaves, and one **threshold** for all: a
tensor is kept at level/threshold. The level is its scale, too: survivors are divided by its power
of two before they are rotated, so that a tensor of large change is no noise on its neighbours.

`dare_agg/codec/UPDATE_FORMAT.md`, section 11, is the normative text; integers and powers of two
only, so both ends compute the same.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.strata import Strata, StrataInARow
from dare_agg.errors import ConfigError, UpdateError
from dare_agg.vectors.layout import MAX_TENSORS, FloatVector

Whole = NDArray[np.int64]

MAX_LEVEL = 255
# Of a level's power of two: that of level 4 is 2^-39.
_SCALE_FROM = -40
_MANTISSAS = 1 << 15
_OCTAVES = 96
MAX_THRESHOLD = _MANTISSAS * _OCTAVES - 1
# Strides are multiples of 1/32 below 16, and whole from there: equal strata are drawn faster.
_FINE = 32
_WHOLE_FROM = 16
_LARGEST = 1 << 20
_HEAD = struct.Struct("<I")
_MANY_RUNS = 16


@dataclass(frozen=True)
class RateTable:
    """A level for each tensor, in layout order, and the threshold of all; checked when made.

    Level 0 keeps nothing of a tensor: its delta is zero.
    """

    levels: bytes
    threshold: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= MAX_THRESHOLD:
            raise ConfigError(
                f"threshold {self.threshold} of keep rates; 0 to {MAX_THRESHOLD} are allowed"
            )
        if len(self.levels) > MAX_TENSORS:
            raise ConfigError(f"{len(self.levels)} levels; at most {MAX_TENSORS} are allowed")

    @property
    def nbytes(self) -> int:
        """Bytes of the table as it is written."""
        return _HEAD.size + len(self.levels)

    def to_bytes(self) -> bytes:
        """The table as it travels."""
        return _HEAD.pack(self.threshold) + self.levels

    @cached_property
    def strides(self) -> tuple[Whole, Whole]:
        """Numerator and denominator of each tensor's stride, in lowest terms; 0 for level 0."""
        levels = np.frombuffer(self.levels, np.uint8).astype(np.int64)
        mantissa = _MANTISSAS + self.threshold % _MANTISSAS
        shift = self.threshold // _MANTISSAS - 10 - levels // 4
        # Beyond these, the stride is at one of its ends whatever the rest.
        shift = np.clip(shift, -20, 30)
        num = np.where(shift >= 0, mantissa << np.maximum(shift, 0), mantissa)
        num //= (4 + levels % 4) << np.maximum(-shift, 0)
        fine = num < _FINE * _WHOLE_FROM
        num = np.where(fine, np.maximum(num, _FINE), np.minimum(num // _FINE, _LARGEST))
        den = np.where(fine, _FINE, 1)
        common = np.gcd(num, den)
        num //= common
        return np.where(levels == 0, 0, num), den // common

    def counts(self, sizes: Whole) -> Whole:
        """Survivors of each tensor."""
        num, den = self.strides
        return np.where(num > 0, -(-sizes * den // np.maximum(num, 1)), 0)

    @cached_property
    def scales(self) -> FloatVector:
        """What each tensor's survivors are divided by before they are coded: powers of two."""
        levels = np.frombuffer(self.levels, np.uint8).astype(np.int32)
        return np.ldexp(np.float32(1), levels // 4 + _SCALE_FROM).astype(np.float32)

    @property
    def largest_scale(self) -> float:
        """The largest scale of a tensor of which anything is kept; 0 where there is none."""
        kept = np.frombuffer(self.levels, np.uint8) > 0
        return float(self.scales[kept].max()) if kept.any() else 0.0


def read_table(data: bytes | memoryview, tensors: int) -> RateTable:
    """Read a table of so many tensors; raises `UpdateError` for anything that is none."""
    if len(data) != _HEAD.size + tensors:
        raise UpdateError(
            f"keep rates of {len(data)} bytes; {tensors} tensors have {_HEAD.size + tensors}",
            reason="truncated" if len(data) < _HEAD.size + tensors else "trailing",
        )
    (threshold,) = _HEAD.unpack_from(data)
    try:
        return RateTable(bytes(data[_HEAD.size :]), threshold)
    except ConfigError as error:
        raise UpdateError(str(error), reason="mask") from error


@dataclass(frozen=True)
class TensorRates:
    """Keep rates by tensor as an update has them.

    ``sizes`` are the tensors' elements in layout order. ``table`` is None where it comes with an
    update that was not read yet; with ``told`` both ends know it beforehand, and it does not
    travel.
    """

    sizes: tuple[int, ...]
    table: RateTable | None = None
    told: bool = False
    _made: dict[str, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    def __post_init__(self) -> None:
        if self.table is not None and len(self.table.levels) != len(self.sizes):
            raise ConfigError(
                f"keep rates of {len(self.table.levels)} tensors; the layout has {len(self.sizes)}"
            )
        if self.told and self.table is None:
            raise ConfigError("keep rates that are told beforehand need their table")

    @property
    def known(self) -> RateTable:
        """The table; raises `ConfigError` where there is none yet."""
        if self.table is None:
            raise ConfigError(
                "the update's keep rates are not known yet; make them of the delta (`fitted_rates`)"
            )
        return self.table

    @property
    def table_bytes(self) -> int:
        """Bytes of the table inside an update."""
        return 0 if self.told else _HEAD.size + len(self.sizes)

    @property
    def survivors(self) -> int:
        """How many elements survive."""
        return int(self.known.counts(np.array(self.sizes, np.int64)).sum())

    def most_survivors(self, uniform: int) -> int:
        """Most survivors that an update may have whose one keep rate for all gave ``uniform``."""
        return uniform + len(self.sizes)

    def read(self, data: memoryview) -> TensorRates:
        """These rates with the table that ``data``, an update's payload, begins with."""
        if self.told or self.table is not None:
            return self
        return replace(self, table=read_table(data[: self.table_bytes], len(self.sizes)))

    def strata(self, key: bytes, rank: int) -> StrataInARow:
        """The strata of a mask with this key and rank."""
        kept_key, kept_rank, kept = self._made.get("strata", (None, None, None))
        if (kept_key, kept_rank) == (key, rank):
            return kept
        num, den = self.known.strides
        parts, origin = [], 0
        for size, n, d in zip(self.sizes, num.tolist(), den.tolist(), strict=True):
            if size and n:
                family, turn = divmod(rank, n // d)
                parts.append(Strata(size, n, d, family_key(key, family), turn, origin))
            origin += size
        strata = StrataInARow(parts)
        self._made["strata"] = key, rank, strata
        return strata

    def scale(self, values: FloatVector, first: int, *, down: bool) -> None:
        """Bring survivors from number ``first`` on to their tensors' scale, or back, in place."""
        starts, up, inverse = self._scales()
        factors = inverse if down else up
        stop = first + values.size
        number = int(np.searchsorted(starts, first, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left"))
        if last - number > _MANY_RUNS:
            ends = np.clip(starts[number : last + 1], first, stop)
            values *= np.repeat(factors[number:last], np.diff(ends))
            return
        for place in range(number, last):
            begin, end = max(first, int(starts[place])), min(stop, int(starts[place + 1]))
            values[begin - first : end - first] *= factors[place]

    def _scales(self) -> tuple[Whole, FloatVector, FloatVector]:
        """Survivors before each tensor of which any are kept, its scale, and one over it."""
        if "scales" not in self._made:
            counts = self.known.counts(np.array(self.sizes, np.int64))
            kept = counts > 0
            starts = np.concatenate([[0], np.cumsum(counts[kept])])
            scales = self.known.scales[kept]
            self._made["scales"] = starts, scales, np.float32(1) / scales
        return self._made["scales"]


def family_key(key: bytes, family: int) -> bytes:
    """The key of those ranks that no longer fit disjointly into a tensor's strata."""
    if not family:
        return key
    return hashlib.sha256(b"dare-agg mask family 1\0" + _HEAD.pack(family) + key).digest()[:16]
