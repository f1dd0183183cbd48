"""Clip, sum and noise on the server: what a round releases of many clients' updates.

The survivors of each client, rescaled as they are summed, and its dense values beside them are
one vector; it is scaled to norm C at most, last of all that happens to it. So one client moves
the sum by C, and Gaussian noise of standard deviation z·C hides it; the sum is then divided by
how many clients are expected, which nobody's presence changes.

All numbers lie on a grid, a power of two below z·C/2²⁹: clients' values are rounded towards
zero, which lengthens no vector, sums are exact in any order, and noise is rounded to the same
grid, so that the low bits of a sum say nothing (Mironov 2012).

Reference: McMahan et al. 2018, arXiv 1710.06963; Andrew et al. 2021, arXiv 1905.03871 (the norm C
that follows a quantile of the clients' norms).
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import Keystream, derive_key
from dare_agg.errors import MergeError
from dare_agg.vectors.sources import DeltaSource, SparseSource

# σ is between 2^28 and 2^29 steps of the grid.
_GRID_BITS = 29
# A float32 sum of squares in float64 is right to less than this.
_SLACK = 1e-12
# Share of the noise's budget that the count of clients below C may take: σ_b of at least 2z.
COUNT_SHARE = 20.0
# How fast C follows the quantile.
CLIP_RATE = 0.2
_PIECE = 1 << 16


@dataclass(frozen=True)
class Clipping:
    """The norm C of a round, the noise multiplier z, and the quantile C follows (0: it stays)."""

    norm: float
    noise: float
    quantile: float = 0.0

    def split(self, expected: float) -> tuple[float, float]:
        """Noise multiplier of the sum, and deviation of the count of clients below C.

        Both together are a release of multiplier ``noise``: 1/z² = 1/z_Δ² + 1/(2σ_b)².
        """
        if not self.quantile:
            return self.noise, 0.0
        counted = max(expected / COUNT_SHARE, 2 * self.noise)
        return 1 / math.sqrt(self.noise**-2 - (2 * counted) ** -2), counted

    def after(self, below: float) -> float:
        """The norm of the next round, where a share ``below`` of the clients lay below this."""
        if not self.quantile:
            return self.norm
        return self.norm * math.exp(-CLIP_RATE * (below - self.quantile))


@dataclass(frozen=True)
class Contribution:
    """One client's vector: survivors in the order of the mask, then dense values."""

    values: NDArray[np.float32]

    @property
    def norm(self) -> float:
        """‖x‖ in float64."""
        pieces = (self.values[lo : lo + _PIECE] for lo in range(0, self.values.size, _PIECE))
        return math.sqrt(math.fsum(float(np.sum(np.square(p, dtype=np.float64))) for p in pieces))


@dataclass(frozen=True)
class Release:
    """What a round releases: the noised mean, its noise multiplier and the norm that follows.

    ``clipped`` is the share of clients that were clipped, without noise: not to be published.
    """

    mean: NDArray[np.float32]
    noise: float
    next_norm: float
    deviation: float
    commitment: bytes
    clipped: float


def contribution(update: DeltaSource, dense: DeltaSource | None, survivors: int) -> Contribution:
    """The vector of an update whose mask keeps ``survivors`` elements.

    Raises `MergeError` for another number of survivors.
    """
    size = survivors + (dense.size if dense is not None else 0)
    values = np.empty(size, np.float32)
    if survivors == update.size:
        update.read(0, update.size, values[:survivors])
    else:
        at = 0
        if not isinstance(update, SparseSource):
            raise MergeError("an update that lists no survivors cannot be clipped; leave steps out")
        for _, piece in update.sparse(0, update.size):
            values[at : at + piece.size] = piece
            at += piece.size
        if at != survivors:
            raise MergeError(f"an update of {at} survivors where the round's mask has {survivors}")
    if dense is not None:
        dense.read(0, dense.size, values[survivors:])
    return Contribution(values)


def grid_step(deviation: float) -> float:
    """The grid's step for noise of this standard deviation, a power of two."""
    return 2.0 ** (math.frexp(deviation)[1] - _GRID_BITS)


def on_grid(one: Contribution, norm: float, step: float) -> NDArray[np.int64]:
    """The vector, of norm ``norm`` at most, in whole steps towards zero."""
    factor = min(1.0, norm / one.norm * (1 - _SLACK)) if one.norm else 1.0
    return np.trunc(one.values * np.float64(factor / step)).astype(np.int64)


def release(
    contributions: Sequence[Contribution],
    size: int,
    expected: float,
    clipping: Clipping,
    seed: bytes,
    number: int,
    shape: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
) -> Release:
    """Clip, sum, noise and divide the vectors, of ``size`` elements each, of round ``number``.

    The noise is drawn from ``seed``, which nobody but the server may know, the round and the sum
    itself: the same sum again gets the same noise and is no second release, another one gets
    noise of its own. ``shape`` makes of it, in units of its deviation, what is added.
    """
    noise, count_deviation = clipping.split(expected)
    deviation = noise * clipping.norm
    step = grid_step(deviation)
    total = np.zeros(size, np.int64)
    below = 0.0
    clipped = 0
    for one in contributions:
        total += on_grid(one, clipping.norm, step)
        inside = one.norm <= clipping.norm
        clipped += not inside
        below += 0.5 if inside else -0.5
    terms = np.array([clipping.norm, clipping.noise, clipping.quantile, expected, below], "<f8")
    sums = total.astype("<i8", copy=False)
    commitment = hmac.digest(seed, hashlib.sha256(sums.data).digest() + terms.tobytes(), "sha256")
    drawn = fresh_noise(seed, number, commitment, size + 1)
    added = drawn[:size] if shape is None else shape(drawn[:size])
    total += np.rint(added * (deviation / step)).astype(np.int64)
    share = (below + count_deviation * drawn[size]) / expected + 0.5
    mean = (total * (step / expected)).astype(np.float32)
    return Release(
        mean,
        clipping.noise,
        clipping.after(share),
        deviation,
        commitment,
        clipped / max(1, len(contributions)),
    )


def fresh_noise(seed: bytes, number: int, commitment: bytes, count: int) -> NDArray[np.float64]:
    """``count`` numbers of N(0, 1) for a round and its sum, as `release` draws them."""
    return gaussian(derive_key(seed, "privacy noise", number, commitment), count)


def gaussian(key: bytes, count: int) -> NDArray[np.float64]:
    """``count`` numbers of N(0, 1) from a key's keystream, by Box and Muller."""
    pairs = (count + 1) // 2
    words = Keystream(key).read(0, 16 * pairs).copy().view("<u8") >> np.uint64(11)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2 * np.log(uniform[:pairs]))
    angle = 2 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
