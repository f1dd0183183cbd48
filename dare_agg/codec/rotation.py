"""Randomised Hadamard rotation of survivors, in blocks that are never padded.

Survivors are taken in groups of at most 65,536. Inside a group, the first ``m·1024`` form a
row-major matrix of 1024 rows and m columns, and each **column** is a block: butterflies then
add long runs of neighbours, which is fast and, being plain float32 additions, gives the same
bits on every platform. What is left of the last group (< 1024) forms blocks of 512, 256, 128,
64 and 32 neighbours, largest first, each at most once; the last < 32 values are not rotated.

Random signs are the bits of the values key's keystream: survivor i takes bit i mod 8 of
byte ⌊i/8⌋, 1 for minus.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.buffers import borrowed
from dare_agg.vectors.layout import FloatVector

Matrix = NDArray[np.float32]

BLOCK = 1024
GROUP = 1 << 16
_SIDE = 32
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
        with borrowed(whole, np.uint32) as signs:
            rows = signs.reshape(-1, 8)
            # "clip" writes straight into the buffer; a byte is never out of range.
            _SIGN_BITS.take(keystream[: whole // 8], axis=0, out=rows, mode="clip")
            bits[:whole] ^= signs
    if whole < values.size:
        bits[whole:] ^= _SIGN_BITS[keystream[whole // 8]][: values.size - whole]


def hadamard(matrix: Matrix, spare: Matrix) -> Matrix:
    """Transform each column; return ``matrix`` or ``spare``, whichever holds the result.

    Both are (rows, columns), C-contiguous, and both are overwritten; rows is a power of two
    up to 1024. A level of distance d sends rows i and i + d to their sum and difference. Up
    to 512 rows the levels are rows/2, rows/4, …, 1: the Hadamard matrix in natural order. With
    1024 rows the levels are 512 … 32, then row 32·a + b moves to 32·b + a, then 512 … 32 again:
    the same matrix with its rows so moved, in runs of at least 32 rows. Twice is rows times
    the identity, either way.
    """
    rows, columns = matrix.shape
    if rows < BLOCK:
        return _levels(matrix, spare, rows // 2, 1)
    half = _levels(matrix, spare, BLOCK // 2, _SIDE)
    other = matrix if half is spare else spare
    square = (_SIDE, _SIDE, columns)
    np.copyto(other.reshape(square), half.reshape(square).transpose(1, 0, 2))
    return _levels(other, half, BLOCK // 2, _SIDE)


def _levels(matrix: Matrix, spare: Matrix, distance: int, last: int) -> Matrix:
    columns = matrix.shape[1]
    while distance >= last:
        pairs = matrix.reshape(-1, 2, distance * columns)
        result = spare.reshape(-1, 2, distance * columns)
        np.add(pairs[:, 0], pairs[:, 1], out=result[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=result[:, 1])
        matrix, spare = spare, matrix
        distance //= 2
    return matrix


def column_sums(matrix: NDArray[np.float32]) -> FloatVector:
    """Sum each column by halving: row i takes row i + rows/2 until one row is left.

    Destroys ``matrix``. Unlike a library's sum, the order of additions is fixed.
    """
    rows = matrix.shape[0]
    while rows > 1:
        rows //= 2
        np.add(matrix[:rows], matrix[rows : 2 * rows], out=matrix[:rows])
    return matrix[0].copy()
