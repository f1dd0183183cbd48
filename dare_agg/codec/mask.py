"""Seeded masks: which elements of a delta survive, drawn again from a key by anyone.

DARE (arXiv 2311.03099, section 3.2) keeps each element with probability 1 − p. Two masks
do so:

- **stratified** (default): the flat vector is cut into strata of S = 1/(1−p) neighbours and
  one element of each survives. The number of survivors is known beforehand, they come
  sorted, and any part can be drawn alone.
- **bernoulli**: every element is kept by itself, as in the paper.

Both rotate by rank: clients with one key and ranks below ⌊S⌋ keep disjoint elements.
Integers only, so every platform draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import Keystream
from dare_agg.codec.kernels import compiled, plain_float32
from dare_agg.codec.rates import TensorRates
from dare_agg.codec.strata import Strata, StrataInARow
from dare_agg.errors import ConfigError
from dare_agg.vectors.layout import MAX_PARAMETERS, FloatVector

Positions = NDArray[np.int64]

MAX_STRIDE = 1 << 20
MASK_KINDS = ("stratified", "bernoulli")
_COUNT_CHUNK = 1 << 16


@dataclass(frozen=True)
class DropRate:
    """An exact drop rate p, held as its stride S = 1/(1−p) = numerator/denominator ≥ 1."""

    numerator: int
    denominator: int

    def __post_init__(self) -> None:
        for part in (self.numerator, self.denominator):
            if isinstance(part, bool) or not isinstance(part, int):
                raise ConfigError(f"stride part {part!r} must be an integer")
        if not 1 <= self.denominator <= self.numerator <= MAX_STRIDE:
            raise ConfigError(
                f"drop rate with stride {self.numerator}/{self.denominator}; 1 <= denominator <= "
                f"numerator <= {MAX_STRIDE} is needed"
            )
        if math.gcd(self.numerator, self.denominator) != 1:
            raise ConfigError(
                f"stride {self.numerator}/{self.denominator} is not in lowest terms; divide by "
                f"{math.gcd(self.numerator, self.denominator)}"
            )

    @property
    def p(self) -> float:
        """Probability that an element is dropped."""
        return float(1 - Fraction(self.denominator, self.numerator))

    @property
    def keep(self) -> float:
        """Probability that an element survives, 1 − p."""
        return self.denominator / self.numerator

    def survivors(self, size: int) -> int:
        """How many of so many elements a stratified mask of this one rate keeps."""
        return -(-size * self.denominator // self.numerator)

    def __str__(self) -> str:
        return f"{self.p:g}"


def parse_drop_rate(value: str | float | int | Fraction | DropRate) -> DropRate:
    """Read a drop rate exactly; a float counts as the decimal it prints as.

    >>> parse_drop_rate("0.99")
    DropRate(numerator=100, denominator=1)

    Raises `ConfigError` for anything outside [0, 1), not a number, or finer than a stride of
    2**20 in lowest terms.
    """
    if isinstance(value, DropRate):
        return value
    try:
        if isinstance(value, bool):
            raise ValueError
        rate = Fraction(repr(value) if isinstance(value, float) else value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"drop rate {value!r} is not a number; 0 <= p < 1 is needed") from error
    if not 0 <= rate < 1:
        raise ConfigError(f"drop rate {str(value)[:40]} is outside [0, 1); for example 0.9")
    stride = 1 / (1 - rate)
    if stride.numerator > MAX_STRIDE:
        raise ConfigError(
            f"drop rate {str(value)[:40]} has stride {str(stride)[:40]}, whose terms exceed "
            f"{MAX_STRIDE}; use fewer digits"
        )
    return DropRate(stride.numerator, stride.denominator)


def take(vector: FloatVector, positions: Positions, out: FloatVector) -> None:
    """``out = vector[positions]``; the positions must lie in the vector."""
    loops = compiled()
    if loops is not None and plain_float32(vector):
        loops.take(positions, vector, out)
    else:
        # "clip" writes straight to where the values belong.
        vector.take(positions, out=out, mode="clip")


@dataclass(frozen=True)
class Mask:
    """The survivors of one update: positions below ``size``, fixed by key and rank.

    Stratum j of a stratified mask is ``[⌊j·num/den⌋, ⌊(j+1)·num/den⌋)`` cut at ``size``, with
    S = num/den; its survivor is ``lo + ((u_j·w >> 32) + rank) mod w`` for width w, u_j the
    j-th u32 of the key's AES-128-CTR keystream, and is rescaled by w. A Bernoulli mask keeps
    i where ``(u_i + rank·T) mod 2**32 < T`` with ``T = ⌊2**32·den/num⌋`` and rescales by S.

    With ``rates`` each tensor has strata of its own stride (see `dare_agg.codec.rates`), and
    ``drop_rate`` says only how much there may be of all. Ranks are disjoint inside a tensor as
    far as they fit into its strata; the next ones draw from another key there.
    """

    kind: str
    size: int
    drop_rate: DropRate
    key: bytes
    rank: int = 0
    rates: TensorRates | None = None
    _drawn: dict[str, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    def __post_init__(self) -> None:
        if self.kind not in MASK_KINDS:
            raise ConfigError(f"mask {self.kind!r} is unknown; known: {', '.join(MASK_KINDS)}")
        if not 0 <= self.size <= MAX_PARAMETERS:
            raise ConfigError(f"mask of {self.size} elements; 0 to {MAX_PARAMETERS} are allowed")
        if not 0 <= self.rank < 1 << 32:
            raise ConfigError(f"rank {self.rank} is outside [0, 2**32)")
        if self.rates is None:
            return
        if self.kind != "stratified":
            raise ConfigError(
                f"keep rates by tensor with mask {self.kind!r}; they need mask='stratified', or "
                "one rate for all (keep_rates='uniform')"
            )
        if sum(self.rates.sizes) != self.size:
            raise ConfigError(
                f"keep rates of {sum(self.rates.sizes)} elements, the mask has {self.size}"
            )

    @property
    def survivors(self) -> int:
        """How many elements survive (a Bernoulli mask is drawn once to count)."""
        if self.kind == "stratified":
            return self._strata().count
        return int(self._cumulative()[-1])

    def ordinal(self, position: int) -> int:
        """Number of survivors before ``position``."""
        position = max(0, min(position, self.size))
        if self.kind == "stratified":
            return self._strata().ordinal(position)
        chunk = position // _COUNT_CHUNK
        before = int(self._cumulative()[chunk])
        return before + self._bernoulli(Keystream(self.key), chunk * _COUNT_CHUNK, position).size

    def indices(self, lo: int, hi: int) -> Positions:
        """Survivors' positions in ``[lo, hi)``, ascending."""
        lo, hi = max(0, lo), min(hi, self.size)
        if lo >= hi:
            return np.empty(0, np.int64)
        if self.kind == "bernoulli":
            return self._bernoulli(Keystream(self.key), lo, hi)
        return self._strata().indices(lo, hi)

    def blocks(
        self, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[Positions, FloatVector | np.float32]]:
        """Yield ``(positions, rescale)`` for survivors number ``first`` to ``last``, in order.

        ``rescale`` is a scalar where all elements share it, else one value an element. The
        arrays may be reused by the next step: do not keep them.
        """
        stop = self.survivors if last is None else min(last, self.survivors)
        if self.kind == "stratified":
            yield from self._strata().blocks(first, stop)
            return
        stream = Keystream(self.key)
        scale = np.float32(self.drop_rate.numerator / self.drop_rate.denominator)
        cumulative = self._cumulative()
        chunk = int(np.searchsorted(cumulative, first, side="right")) - 1
        while first < stop:
            lo = chunk * _COUNT_CHUNK
            positions = self._bernoulli(stream, lo, min(self.size, lo + _COUNT_CHUNK))
            begin = first - int(cumulative[chunk])
            end = min(stop - int(cumulative[chunk]), positions.size)
            if end > begin:
                yield positions[begin:end], scale
            first, chunk = int(cumulative[chunk + 1]), chunk + 1

    def within(self, lo: int, hi: int) -> Iterator[tuple[int, Positions, FloatVector | np.float32]]:
        """As `blocks`, for the survivors in ``[lo, hi)``, each with its first one's number."""
        lo, hi = max(0, lo), min(hi, self.size)
        if lo >= hi:
            return
        if self.kind == "bernoulli":
            first = self.ordinal(lo)
            for positions, scale in self.blocks(first, self.ordinal(hi)):
                yield first, positions, scale
                first += positions.size
            return
        yield from self._strata().within(lo, hi)

    def gather(self, vector: FloatVector) -> FloatVector:
        """Return the survivors' values, unscaled, as float32 of ``survivors`` elements."""
        self._check(vector)
        values = np.empty(self.survivors, np.float32)
        at = 0
        for positions, _ in self.blocks():
            take(vector, positions, values[at : at + positions.size])
            at += positions.size
        return values

    def scatter(
        self, values: FloatVector, out: FloatVector | None = None, *, rescale: bool = True
    ) -> FloatVector:
        """Return a vector of ``size`` with the survivors in place, rescaled, and 0 elsewhere.

        Raises `ConfigError` unless there is a value for each survivor.
        """
        if values.shape != (self.survivors,):
            raise ConfigError(f"{values.shape} values; this mask has {self.survivors} survivors")
        vector = np.zeros(self.size, np.float32) if out is None else out
        self._check(vector)
        if out is not None:
            vector[:] = 0
        at = 0
        for positions, scale in self.blocks():
            piece = values[at : at + positions.size]
            vector[positions] = piece * scale if rescale else piece
            at += positions.size
        return vector

    def _check(self, vector: FloatVector) -> None:
        if vector.shape != (self.size,) or vector.dtype != np.float32:
            raise ConfigError(
                f"vector of shape {vector.shape}, {vector.dtype}; this mask needs "
                f"({self.size},) float32"
            )

    def _strata(self) -> StrataInARow:
        if "strata" not in self._drawn:
            num, den = self.drop_rate.numerator, self.drop_rate.denominator
            self._drawn["strata"] = (
                StrataInARow([Strata(self.size, num, den, self.key, self.rank)])
                if self.rates is None
                else self.rates.strata(self.key, self.rank)
            )
        return self._drawn["strata"]

    def _bernoulli(self, stream: Keystream, lo: int, hi: int) -> Positions:
        threshold = (self.drop_rate.denominator << 32) // self.drop_rate.numerator
        if threshold >= 1 << 32:
            return np.arange(lo, hi, dtype=np.int64)
        parts = []
        for start in range(lo, hi, _COUNT_CHUNK):
            words = stream.words(start, min(hi, start + _COUNT_CHUNK) - start)
            shift = self.rank * threshold % (1 << 32)
            if shift:
                words = words + np.uint32(shift)
            kept = np.flatnonzero(words < np.uint32(threshold))
            kept += start
            parts.append(kept)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _cumulative(self) -> NDArray[np.int64]:
        if "cumulative" not in self._drawn:
            stream = Keystream(self.key)
            counts = [0]
            for lo in range(0, self.size, _COUNT_CHUNK):
                kept = self._bernoulli(stream, lo, min(self.size, lo + _COUNT_CHUNK))
                counts.append(counts[-1] + kept.size)
            self._drawn["cumulative"] = np.array(counts, np.int64)
        return self._drawn["cumulative"]
