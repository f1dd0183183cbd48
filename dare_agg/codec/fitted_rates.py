"""Keep rates by tensor that fit a delta: as many bytes as one rate for all, with less noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.mask import DropRate
from dare_agg.codec.payload import payload_bytes
from dare_agg.codec.rates import MAX_LEVEL, MAX_THRESHOLD, RateTable, TensorRates, Whole
from dare_agg.errors import ConfigError
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource

# A tensor whose change was less than this part of the whole model's, by root mean squares, may
# change more in the next round: levels told beforehand are at least so large.
TOLD_FLOOR = 1 / 16
_PIECE = 1 << 16
# Mean squares from here to its inverse are those of float32 squares to 1e-6.
_PLAIN = 1e-30
_TRIES = 256


def tensor_squares(
    sizes: Sequence[int], delta: FloatVector | tuple[FloatVector, FloatVector] | DeltaSource
) -> NDArray[np.float64]:
    """The sum of squares of each tensor of a delta, or of a pair (base, tuned)."""
    stops = np.cumsum(np.array(sizes, np.int64))
    sums = np.zeros(len(sizes), np.float64)
    size = int(stops[-1]) if stops.size else 0
    room = np.empty(min(_PIECE, size), np.float32)
    for lo in range(0, size, _PIECE):
        hi = min(size, lo + _PIECE)
        piece = room[: hi - lo]
        if isinstance(delta, tuple):
            np.subtract(delta[1][lo:hi], delta[0][lo:hi], out=piece)
        elif isinstance(delta, np.ndarray):
            piece = delta[lo:hi]
        else:
            delta.read(lo, hi, piece)
        add_squares(sums, stops, lo, piece)
    return sums


def add_squares(sums: NDArray[np.float64], stops: Whole, lo: int, piece: FloatVector) -> None:
    """Add the squares of elements from number ``lo`` on to the sums of their tensors."""
    number, at = int(np.searchsorted(stops, lo, side="right")), 0
    while at < piece.size:
        end = min(piece.size, int(stops[number]) - lo)
        sums[number] += _squares(piece[at:end])
        at, number = end, number + 1


def _squares(part: FloatVector) -> float:
    """The sum of squares; of float32 ones, which are faster, where none of weight is lost."""
    with np.errstate(over="ignore", under="ignore"):
        found = float(np.sum(np.square(part), dtype=np.float64))
    if part.size * _PLAIN < found < part.size / _PLAIN:
        return found
    return float(np.square(part, dtype=np.float64).sum())


def levels_of(sizes: Sequence[int], squares: NDArray[np.float64], *, floor: float = 0.0) -> bytes:
    """The level of each tensor's root mean square, from its sum of squares.

    None is below ``floor`` times the root mean square of all. Raises `ConfigError` for sums that
    are no numbers of at least 0.
    """
    counts = np.array(sizes, np.float64)
    if not np.isfinite(squares).all() or (squares < 0).any():
        raise ConfigError("a tensor's sum of squares is no finite number of at least 0")
    mean = np.sqrt(squares / np.maximum(counts, 1))
    if floor and counts.sum():
        mean = np.maximum(mean, floor * np.sqrt(squares.sum() / counts.sum()))
    mantissa, exponent = np.frexp(mean)
    levels = 4 * (exponent + 39) + np.floor(8 * mantissa + 0.5).astype(np.int64) - 4
    return np.where(mean > 0, np.clip(levels, 1, MAX_LEVEL), 0).astype(np.uint8).tobytes()


def fitted_rates(
    sizes: Sequence[int], levels: bytes, rate: DropRate, values: str, *, told: bool = False
) -> TensorRates:
    """Rates in proportion to the levels, in as many bytes as ``rate`` for all takes.

    The table counts where it travels. A model too small for that gets the survivors of ``rate``,
    or one a tensor; at p = 0 nothing is dropped.
    """
    counted = np.array(sizes, np.int64)
    blank = TensorRates(tuple(sizes), RateTable(levels), told)
    if rate.numerator == rate.denominator:
        return blank
    uniform = rate.survivors(int(counted.sum()))
    most = blank.most_survivors(uniform)
    room = payload_bytes(values, uniform) - blank.table_bytes

    def kept(threshold: int) -> int:
        return int(RateTable(levels, threshold).counts(counted).sum())

    def lowest(at_most: int, above: int = -1) -> int:
        """The lowest threshold that keeps at most so many; it lies above ``above``, mostly near."""
        low, high, step = above, MAX_THRESHOLD, 1
        while above >= 0 and low + step < high:
            if kept(low + step) <= at_most:
                high = low + step
            else:
                low, step = low + step, 2 * step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if kept(middle) <= at_most else (middle, high)
        return high

    if payload_bytes(values, kept(MAX_THRESHOLD)) > room:
        room = payload_bytes(values, most)
    # A rest of up to 31 float32 comes and goes with the count: fewer survivors may take more.
    threshold = lowest(most)
    for _ in range(_TRIES):
        count = kept(threshold)
        if payload_bytes(values, count) <= room:
            return TensorRates(tuple(sizes), RateTable(levels, threshold), told)
        largest = next(k for k in range(count - 1, -1, -1) if payload_bytes(values, k) <= room)
        threshold = lowest(largest, threshold)
    return TensorRates(tuple(sizes), RateTable(levels, MAX_THRESHOLD), told)
