"""Golomb-Rice coding of sorted positions, for the baselines that send explicit indices.

Gaps g ≥ 0 between neighbours are cut into quotient and remainder by 2**m; quotients travel in
unary in one stream, remainders with m bits each in another, so both ends are vectorised.
"""

from __future__ import annotations

import math
import struct

import numpy as np
from numpy.typing import NDArray

_HEAD = struct.Struct("<QBQ")


def best_parameter(count: int, size: int) -> int:
    """The Rice parameter for ``count`` geometric gaps over ``size`` (Sattler et al. 2019)."""
    share = count / size
    if share >= 0.5:
        return 0
    golden = (math.sqrt(5) + 1) / 2
    return max(0, 1 + math.floor(math.log2(math.log(golden - 1) / math.log(1 - share))))


def encode_positions(positions: NDArray[np.int64], size: int) -> bytes:
    """Encode ascending, distinct positions below ``size``."""
    if not positions.size:
        return _HEAD.pack(0, 0, 0)
    m = best_parameter(positions.size, size)
    gaps = np.diff(positions, prepend=-1) - 1
    quotients = gaps >> m
    ends = np.cumsum(quotients + 1) - 1
    unary = np.ones(int(ends[-1]) + 1, np.uint8)
    unary[ends] = 0
    packed = np.packbits(unary).tobytes()
    if m:
        shifts = np.arange(m, dtype=np.int64)
        bits = ((gaps[:, None] >> shifts) & 1).astype(np.uint8)
        remainders = np.packbits(bits.ravel()).tobytes()
    else:
        remainders = b""
    return _HEAD.pack(positions.size, m, unary.size) + packed + remainders


def decode_positions(blob: bytes) -> NDArray[np.int64]:
    """Return the positions that `encode_positions` was given."""
    count, m, length = _HEAD.unpack_from(blob)
    if not count:
        return np.empty(0, np.int64)
    body = np.frombuffer(blob, np.uint8, offset=_HEAD.size)
    cut = -(-length // 8)
    ends = np.flatnonzero(np.unpackbits(body[:cut], count=length) == 0)
    gaps = (np.diff(ends, prepend=-1) - 1).astype(np.int64) << m
    if m:
        bits = np.unpackbits(body[cut:], count=count * m).reshape(count, m).astype(np.int64)
        gaps += (bits << np.arange(m, dtype=np.int64)).sum(axis=1)
    return np.cumsum(gaps + 1) - 1
