"""A sum of clipped gradients and its noise: what one step of a private training releases.

Each record's gradient is scaled to norm C at most, C a little less than promised (`clip_to`),
the sum is taken in float64 and rounded to a grid, a power of two of 2⁻²⁸ to 2⁻²⁹ of the noise's
deviation. Noise is rounded to the same grid, so that the low bits of a released number say
nothing (Mironov 2012). Rounding moves a sum of d numbers by √d/2 steps at most, two neighbouring
sums by √d; that is what C was lessened by.

Reference: Abadi et al. 2016, arXiv 1607.00133 (DP-SGD).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import Keystream, derive_key
from dare_agg.errors import ConfigError
from dare_agg.privacy.central import gaussian, grid_step

# float64 sums of gradients, and norms of them, are right to far less than this.
_SLACK = 1e-9
# Above it the grid no longer resolves what is released.
MOST_MULTIPLIER = 1000.0
_PIECE = 1 << 16


def clip_to(norm: float, multiplier: float, size: int) -> float:
    """The norm to clip to, so that the rounded sum of ``size`` numbers moves by ``norm`` at most.

    Raises `ConfigError` for noise so loud that nothing is learned.
    """
    if multiplier > MOST_MULTIPLIER:
        raise ConfigError(
            f"a noise multiplier of {multiplier:g} drowns any gradient (at most "
            f"{MOST_MULTIPLIER:g} is taken); take a larger dp-epsilon, fewer rounds or "
            "steps, or a smaller batch"
        )
    return norm * (1 - _SLACK) - math.sqrt(size) * grid_step(multiplier * norm)


def drawn_rows(key: bytes, step: int, rows: int, rate: float) -> NDArray[np.int64]:
    """Which of so many rows take part in a step: each by itself, with probability ``rate``.

    The draws come from a secret key; the rate is kept to 2⁻⁶⁴ and from below.
    """
    if rate >= 1:
        return np.arange(rows)
    stream = Keystream(derive_key(key, "record sample", step, b""))
    words = stream.read(0, 8 * rows).copy().view("<u8")
    return np.flatnonzero(words < np.uint64(math.floor(rate * 2.0**64)))


def noised(
    sums: Sequence[NDArray[np.float64]], deviation: float, key: bytes, step: int
) -> list[NDArray[np.float64]]:
    """Each part of a sum on the grid, with Gaussian noise of this standard deviation, in place.

    The noise is drawn from the key and the step's number: the same key must not be used for
    other records or another model.
    """
    grid = grid_step(deviation)
    drawn = derive_key(key, "record noise", step, b"")
    for number, part in enumerate(sums):
        flat = part.reshape(-1)
        for lo in range(0, flat.size, _PIECE):
            piece = flat[lo : lo + _PIECE]
            noise = gaussian(derive_key(drawn, f"part {number}", lo, b""), piece.size)
            np.rint(piece / grid, out=piece)
            noise *= deviation / grid
            piece += np.rint(noise, out=noise)
            piece *= grid
    return list(sums)
