"""Randomised Hadamard rotation of survivors, in blocks that are never padded.

Survivors are taken in groups of at most 65,536. Inside a group, the first ``m·1024`` form a
row-major matrix of 1024 rows and m columns, and each **column** is a block: butterflies then
add whole rows, which is fast and, being plain float32 additions, gives the same bits on
every platform. What is left of the last group (< 1024) forms blocks of 512, 256, 128, 64 and
32 neighbours, largest first, each at most once; the last < 32 values are not rotated.

Random signs are the bits of the values key's keystream: survivor i takes bit i mod 8 of
byte ⌊i/8⌋, 1 for minus.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dare_agg.layout import FloatVector

BLOCK = 1024
GROUP = 1 << 16
SMALLEST = 32
_TAIL_BLOCKS = (512, 256, 128, 64, 32)

# Row b holds the IEEE sign bits that the eight bits of byte b stand for.
_SIGN_BITS = np.unpackbits(
    np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"
).astype(np.uint32) << np.uint32(31)


def cut_blocks(count: int) -> Iterator[tuple[int, int, int]]:
    """Yield ``(start, rows, columns)`` for the blocks among the first ``count`` of a group.

    ``rows`` is the block length; the unrotated rest comes last as ``(start, 1, rest)``.
    """
    at = 0
    if columns := count // BLOCK:
        yield 0, BLOCK, columns
        at = columns * BLOCK
    for rows in _TAIL_BLOCKS:
        if count - at >= rows:
            yield at, rows, 1
            at += rows
    if at < count:
        yield at, 1, count - at


def count_blocks(survivors: int) -> tuple[int, int]:
    """Return (number of rotated blocks, number of unrotated values) for so many survivors."""
    blocks, left = divmod(survivors, BLOCK)
    for rows in _TAIL_BLOCKS:
        if left >= rows:
            blocks, left = blocks + 1, left - rows
    return blocks, left


def flip_signs(values: FloatVector, keystream: NDArray[np.uint8]) -> None:
    """Negate, in place, the values whose keystream bit is 1 (see the module's text)."""
    bits = values.view(np.uint32)
    whole = values.size // 8 * 8
    if whole:
        bits[:whole] ^= _SIGN_BITS.take(keystream[: whole // 8], axis=0).reshape(-1)
    if whole < values.size:
        bits[whole:] ^= _SIGN_BITS[keystream[whole // 8]][: values.size - whole]


def hadamard(matrix: NDArray[np.float32], spare: NDArray[np.float32]) -> None:
    """Multiply each column by the unnormalised Hadamard matrix, in place.

    ``matrix`` is (rows, columns), C-contiguous, rows a power of two; ``spare`` is scratch of
    at least half its size. Butterflies with distance 1, 2, 4, … rows; each is
    ``(a, b) → (a + b, a − b)`` in float32.
    """
    rows, columns = matrix.shape
    flat = matrix.reshape(-1)
    scratch = spare.reshape(-1)[: flat.size // 2]
    distance = 1
    while distance < rows:
        pairs = flat.reshape(-1, 2, distance * columns)
        upper, lower = pairs[:, 0], pairs[:, 1]
        difference = scratch.reshape(upper.shape)
        np.subtract(upper, lower, out=difference)
        np.add(upper, lower, out=upper)
        lower[...] = difference
        distance *= 2


def column_sums(matrix: NDArray[np.float32]) -> FloatVector:
    """Sum each column by halving: row i takes row i + rows/2 until one row is left.

    Destroys ``matrix``. Unlike a library's sum, the order of additions is fixed.
    """
    rows = matrix.shape[0]
    while rows > 1:
        rows //= 2
        np.add(matrix[:rows], matrix[rows : 2 * rows], out=matrix[:rows])
    return matrix[0].copy()
