"""Strata of a stratified mask: of a whole vector, or of each of its tensors with its own stride.

Stratum j of a part of ``size`` elements is ``[⌊j·num/den⌋, ⌊(j+1)·num/den⌋)`` cut at ``size``;
its survivor is ``lo + ((u·w >> 32) + rank) mod w`` for width w, u the u32 of the survivor's
number, counted through all parts, in the key's AES-128-CTR keystream. Integers only, so every
platform draws the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.buffers import borrowed
from dare_agg.codec.derive import Keystream
from dare_agg.codec.kernels import compiled
from dare_agg.vectors.layout import FloatVector

Positions = NDArray[np.int64]
Factors = FloatVector | np.float32
Words = NDArray[np.uint32]
# Lows, widths, and widths as rescale factors.
Uneven = tuple[Positions, NDArray[np.uint64], FloatVector]

# Strata drawn at a time by numpy, which goes over each several times, and by compiled loops.
_CHUNK = 1 << 14
_COMPILED_CHUNK = 1 << 16
# Denominators of strides by tensor divide it.
PATTERN = 32
# Parts in a step from which on numpy draws them all at once.
_MANY = 12


class _Scratch:
    """What drawing a step is done in; the ramp is 0, num, 2·num, … of the stride met last.

    So are the lows and widths of uneven strata: a part's steps begin at one phase but the first.
    """

    def __init__(self, flat: NDArray[np.int64], room: int) -> None:
        self.positions, self.spare = flat[:room], flat[room : 2 * room]
        self._ramp, self._stride = flat[2 * room : 3 * room], 0
        self.keystream = flat[3 * room :].view(np.uint8)
        self._uneven: tuple[tuple[int, int, int], Uneven] | None = None

    def uneven(self, part: Strata, first: int, count: int) -> Uneven:
        """`_uneven` of these strata, as long as it was needed since the stride changed."""
        what = (part.num, part.den, first % part.den)
        if self._uneven is None or self._uneven[0] != what or self._uneven[1][0].size < count:
            self._uneven = what, _uneven(part, first, count)
        lows, widths, factors = self._uneven[1]
        return lows[:count], widths[:count], factors[:count]

    def ramp(self, stride: int, count: int) -> Positions:
        """The first ``count`` multiples of ``stride``."""
        if stride != self._stride:
            self._ramp[:] = np.arange(0, self._ramp.size * stride, stride)
            self._stride = stride
        return self._ramp[:count]


@dataclass(frozen=True)
class Strata:
    """The strata of elements ``origin`` to ``origin + size`` of a vector, of stride num/den."""

    size: int
    num: int
    den: int
    key: bytes
    rank: int
    origin: int = 0

    @property
    def count(self) -> int:
        """How many there are: one survivor each."""
        return -(-self.size * self.den // self.num)

    @property
    def stop(self) -> int:
        """The first element behind them."""
        return self.origin + self.size

    def of(self, position: int) -> int:
        """The stratum that an element of the vector is in."""
        return ((position - self.origin + 1) * self.den - 1) // self.num

    def draw(
        self, words: Words, first: int, last: int, scratch: _Scratch | None = None, at: int = 0
    ) -> tuple[Positions, Factors]:
        """Positions in the vector, and rescale factors, of the survivors of these strata.

        ``words`` are theirs. With ``scratch`` the positions lie in it, from number ``at`` on.
        """
        num, den, origin = self.num, self.den, self.origin
        count = last - first
        if scratch is None:
            positions, spare = np.empty((2, count), np.int64)
        else:
            positions, spare = scratch.positions[at : at + count], scratch.spare[:count]
        if num == den:
            every = np.arange(origin + first, origin + last)
            if scratch is None:
                return every, np.float32(1)
            positions[:] = every
            return positions, np.float32(1)
        even = den == 1 and last * num <= self.size
        if (loops := compiled()) is not None:
            if even:
                loops.draw_whole(words, origin + first * num, num, self.rank, positions)
                return positions, np.float32(num)
            factors = np.empty(count, np.float32)
            if self.has_pattern:
                row = np.array(self.row(), np.int64)[:, None]
                starts = np.array([0, self.count], np.int64)
                loops.draw_parts(words, first, starts, *row, positions, factors)
            else:
                loops.draw_uneven(
                    words, first, num, den, self.size, self.rank, origin, positions, factors
                )
            return positions, factors
        drawn = positions.view(np.uint64)
        if den == 1:
            # The dtype said: NumPy 1 would multiply by a small scalar in 32 bits.
            np.multiply(words, np.uint64(num), out=drawn, dtype=np.uint64)
            drawn >>= np.uint64(32)
            if self.rank % num:
                positions += self.rank % num
                _wrap(drawn, np.uint64(num), spare)
            if scratch is None:
                positions += np.arange(first * num, last * num, num, dtype=np.int64)
                positions += origin
            else:
                positions += scratch.ramp(num, count)
                positions += origin + first * num
            if even:
                return positions, np.float32(num)
            widths = np.full(count, num, np.float32)
            self._draw_cut(words, first, positions, widths)
            return positions, widths
        find = _uneven if scratch is None else scratch.uneven
        lows, wide, factors = find(self, first, count)
        np.multiply(words, wide, out=drawn, dtype=np.uint64)
        drawn >>= np.uint64(32)
        if self.rank:
            positions += self.rank
            if self.rank < num // den:
                _wrap(drawn, wide, spare)
            else:
                drawn %= wide
        positions += lows
        positions += origin + first * num // den
        if last * num > self.size * den:
            factors = factors.copy()
            self._draw_cut(words, first, positions, factors)
        return positions, factors

    def _draw_cut(
        self, words: Words, first: int, positions: Positions, factors: FloatVector
    ) -> None:
        """Draw the last stratum again where the part ends inside it, maybe below the rank."""
        lo = (first + positions.size - 1) * self.num // self.den
        if (width := self.size - lo) < factors[-1]:
            drawn = (int(words[-1]) * width >> 32) + self.rank
            positions[-1], factors[-1] = self.origin + lo + drawn % width, width

    def row(self) -> tuple[int, ...]:
        """What loops over many parts need of each: `draw_parts` of the compiled ones."""
        return self.origin, self.size, self.num, self.den.bit_length() - 1, self.rank

    @property
    def has_pattern(self) -> bool:
        """Whether 32 strata lie as the 32 before them, and the rank turns by less than one."""
        return PATTERN % self.den == 0 and self.rank < self.num // self.den


def _uneven(part: Strata, first: int, count: int) -> Uneven:
    """Where strata from number ``first`` on begin, from the first one's low, and their widths."""
    phase = first % part.den
    bounds = np.arange(phase, phase + count + 1, dtype=np.int64)
    bounds *= part.num
    bounds //= part.den
    widths = np.diff(bounds)
    bounds -= bounds[0]
    return bounds[:-1], widths.view(np.uint64), widths.astype(np.float32)


def _wrap(drawn: NDArray[np.uint64], width: Any, spare: Positions) -> None:
    """Take ``width`` off numbers below twice that, where they reach it."""
    # Past the end, what is left after subtracting is the smaller unsigned number.
    np.subtract(drawn, width, out=spare.view(np.uint64))
    np.minimum(drawn, spare.view(np.uint64), out=drawn)


class StrataInARow:
    """Strata of one or several parts of a vector, in order; survivors are numbered through.

    Of several, every denominator is a power of two and every rank below the stride.
    """

    def __init__(self, parts: Sequence[Strata]) -> None:
        self.parts = tuple(parts)
        # Survivors before each part, and in all.
        self.starts = np.zeros(len(self.parts) + 1, np.int64)
        np.cumsum([part.count for part in self.parts], out=self.starts[1:])
        # A row of each for loops over many parts, whose denominators are powers of two.
        self._table = np.array(
            [part.row() for part in self.parts], np.int64
        ).reshape(-1, 5).T.copy()  # fmt: skip
        self._origins = np.array([part.origin for part in self.parts], np.int64)
        self._stops = np.array([part.stop for part in self.parts], np.int64)

    @property
    def count(self) -> int:
        """How many survivors there are."""
        return int(self.starts[-1])

    def ordinal(self, position: int) -> int:
        """Number of survivors before ``position``."""
        number = int(np.searchsorted(self._stops, position, side="right"))
        if number == len(self.parts) or position <= self.parts[number].origin:
            return int(self.starts[number])
        part, start = self.parts[number], int(self.starts[number])
        stratum = part.of(position)
        words = Keystream(part.key).words(start + stratum, 1)
        survivor = int(part.draw(words, stratum, stratum + 1)[0][0])
        return start + stratum + (survivor < position)

    def indices(self, lo: int, hi: int) -> Positions:
        """Survivors' positions in ``[lo, hi)``, ascending."""
        first, last = self._between(lo, hi)
        if last == first:
            return np.empty(0, np.int64)
        positions = self._step({}, first, last)[0]
        # Only the outermost strata can reach out of the range.
        begin = int(positions[0] < lo)
        return positions[begin : positions.size - int(positions[-1] >= hi)]

    def _between(self, lo: int, hi: int) -> tuple[int, int]:
        """The numbers of the survivors whose strata have elements in ``[lo, hi)``."""
        begin = int(np.searchsorted(self._stops, lo, side="right"))
        end = int(np.searchsorted(self._origins, hi, side="left"))
        if lo >= hi or begin >= end:
            return 0, 0
        outer, inner = self.parts[begin], self.parts[end - 1]
        return (
            int(self.starts[begin]) + outer.of(max(lo, outer.origin)),
            int(self.starts[end - 1]) + inner.of(min(hi, inner.stop) - 1) + 1,
        )

    def blocks(self, first: int, stop: int) -> Iterator[tuple[Positions, Factors]]:
        """Yield positions and factors of survivors number ``first`` to ``stop``, in order.

        The arrays may be reused by the next step. Steps end at multiples, so none reaches over
        two groups of values.
        """
        chunk = _CHUNK if compiled() is None else _COMPILED_CHUNK
        room = min(chunk, max(0, stop - first))
        streams: dict[bytes, Keystream] = {}
        with borrowed(4 * room + 8, np.int64) as flat:
            scratch = _Scratch(flat, room)
            while first < stop:
                last = min(stop, (first // chunk + 1) * chunk)
                yield self._step(streams, first, last, scratch)
                first = last

    def _step(
        self,
        streams: dict[bytes, Keystream],
        first: int,
        last: int,
        scratch: _Scratch | None = None,
    ) -> tuple[Positions, Factors]:
        number = int(np.searchsorted(self.starts, first, side="right")) - 1
        if last <= self.starts[number + 1]:
            part, start = self.parts[number], int(self.starts[number])
            words = self._words(streams, part, first, last, scratch)
            return part.draw(words, first - start, last - start, scratch)
        after = int(np.searchsorted(self.starts, last, side="left"))
        words = self._all_words(streams, number, after, first, last)
        if scratch is None:
            scratch = _Scratch(np.empty(3 * (last - first), np.int64), last - first)
        positions = scratch.positions[: last - first]
        factors = np.empty(last - first, np.float32)
        loops = compiled()
        if loops is not None or after - number > _MANY:
            starts, rows = self.starts[number : after + 1], self._table[:, number:after]
            draw: Any = _draw_parts if loops is None else loops.draw_parts
            draw(words, first, starts, *map(np.ascontiguousarray, rows), positions, factors)
            return positions, factors
        at = first
        for part, start in zip(self.parts[number:after], self.starts[number:after], strict=True):
            end = min(last, int(start) + part.count)
            drawn, own = words[at - first : end - first], factors[at - first : end - first]
            _, own[:] = part.draw(drawn, at - int(start), end - int(start), scratch, at - first)
            at = end
        return positions, factors

    def _all_words(
        self, streams: dict[bytes, Keystream], number: int, after: int, first: int, last: int
    ) -> Words:
        """Words of these survivors, of the parts from ``number`` on."""
        parts = self.parts[number:after]
        drawing = {part.key: part for part in parts if part.num != part.den}
        if len(drawing) == 1:
            (only,) = drawing.values()
            return self._words(streams, only, first, last, None)
        words = np.zeros(last - first, np.uint32)
        for part, start in zip(parts, self.starts[number:after], strict=True):
            lo, hi = max(first, int(start)), min(last, int(start) + part.count)
            if part.num != part.den:
                words[lo - first : hi - first] = self._words(streams, part, lo, hi, None)
        return words

    def _words(
        self,
        streams: dict[bytes, Keystream],
        part: Strata,
        first: int,
        last: int,
        scratch: _Scratch | None,
    ) -> Words:
        """Words of these survivors; none where all elements of the part survive."""
        if part.num == part.den:
            return np.empty(0, np.uint32)
        if part.key not in streams:
            streams[part.key] = Keystream(part.key)
        room = None if scratch is None else scratch.keystream
        return streams[part.key].words(first, last - first, room)

    def within(self, lo: int, hi: int) -> Iterator[tuple[int, Positions, Factors]]:
        """As `blocks`, for the survivors in ``[lo, hi)``, each with its first one's number."""
        first, last = self._between(lo, hi)
        for positions, factors in self.blocks(first, last):
            # Only the outermost strata can reach out of the range.
            skip = int(positions[0] < lo)
            stop = positions.size - int(positions[-1] >= hi)
            if skip or stop < positions.size:
                if stop > skip:
                    own = factors[skip:stop] if isinstance(factors, np.ndarray) else factors
                    yield first + skip, positions[skip:stop], own
            else:
                yield first, positions, factors
            first += positions.size


def _draw_parts(
    words: Words,
    first: int,
    starts: Positions,
    origins: Positions,
    sizes: Positions,
    nums: Positions,
    shifts: Positions,
    turns: Positions,
    positions: Positions,
    factors: FloatVector,
) -> None:
    """As the compiled loop of this name (`dare_agg.codec.numba_loops`)."""
    ends = np.clip(starts, first, first + words.size)
    counts = np.diff(ends)
    each = np.repeat(nums, counts)
    shift = np.repeat(shifts, counts)
    lo = np.arange(first, first + words.size) - np.repeat(starts[:-1], counts)
    lo *= each
    hi = (lo + each) >> shift
    lo >>= shift
    widths = np.minimum(hi, np.repeat(sizes, counts), out=hi)
    widths -= lo
    np.multiply(words, widths, out=positions, casting="unsafe")
    positions >>= 32
    positions += np.repeat(turns, counts)
    # A last stratum that is cut may be narrower than the turn.
    np.subtract(positions, widths, out=positions, where=positions >= widths)
    over = positions >= widths
    if over.any():
        positions[over] %= widths[over]
    positions += lo
    positions += np.repeat(origins, counts)
    factors[:] = widths
