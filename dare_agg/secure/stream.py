"""Masks: keystreams added to the words of a vector, modulo 2**w.

Each mask has a key of its own that is used once, so the AES-256-CTR counter starts at 0. A
word takes 4 bytes of keystream where w ≤ 32 and 8 beyond, little-endian, of which the low
w bits count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from dare_agg.errors import ConfigError

Words = NDArray[np.unsignedinteger[Any]]

MASK_KEY_BYTES = 32
MAX_WORD_BITS = 64
# Zeros, keystream and sum of a chunk stay in the second-level cache together.
_CHUNK_BYTES = 1 << 17
_ZEROS = bytes(_CHUNK_BYTES)


def word_type(bits: int) -> type[np.uint32] | type[np.uint64]:
    """The unsigned type that carries words of ``bits`` bits: uint32 up to 32, else uint64.

    Raises `ConfigError` for more than 64 bits, or none.
    """
    if not 1 <= bits <= MAX_WORD_BITS:
        raise ConfigError(f"words of {bits} bits; 1 to {MAX_WORD_BITS} are possible")
    return np.uint32 if bits <= 32 else np.uint64


def add_mask(words: Words, key: bytes, *, negative: bool = False) -> None:
    """Add the key's keystream to ``words`` in place, or subtract it, modulo the type's size.

    Sums modulo 2**32 or 2**64 are right modulo 2**w as well: cut to w bits at the end
    (`cut_words`).
    """
    if len(key) != MASK_KEY_BYTES:
        raise ConfigError(f"a mask key has {len(key)} bytes; {MASK_KEY_BYTES} are needed")
    kind = np.dtype(words.dtype).newbyteorder("<")
    step = _CHUNK_BYTES // kind.itemsize
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    # update_into asks for room for one block more than it writes.
    buffer = np.empty(_CHUNK_BYTES + 16, np.uint8)
    zeros = memoryview(_ZEROS)
    for start in range(0, words.size, step):
        piece = words[start : start + step]
        count = piece.size * kind.itemsize
        encryptor.update_into(zeros[:count], buffer.data)
        mask = buffer[:count].view(kind)
        if negative:
            piece -= mask
        else:
            piece += mask


def cut_words(words: Words, bits: int) -> Words:
    """Reduce words modulo 2**bits, in place."""
    words &= words.dtype.type((1 << bits) - 1)
    return words


def pack_words(words: Words, bits: int) -> bytes:
    """Write words of ``bits`` bits without gaps: ⌈k·bits/8⌉ bytes.

    Word i takes bits i·w to (i+1)·w of a little-endian bit string; the rest of the last byte
    is 0. Words must be below 2**bits.
    """
    word_type(bits)
    groups = -(-words.size // 64)
    columns = np.zeros((64, groups), np.uint64)
    padded = np.zeros(groups * 64, np.uint64)
    padded[: words.size] = words
    columns[:] = padded.reshape(groups, 64).T
    # 64 words fill exactly `bits` 64-bit lanes.
    lanes = np.zeros((bits, groups), np.uint64)
    for number in range(64):
        lane, shift = divmod(number * bits, 64)
        lanes[lane] |= columns[number] << np.uint64(shift)
        if shift + bits > 64:
            lanes[lane + 1] |= columns[number] >> np.uint64(64 - shift)
    data = np.ascontiguousarray(lanes.T).astype("<u8", copy=False).tobytes()
    return data[: packed_bytes(words.size, bits)]


def unpack_words(data: bytes, count: int, bits: int) -> Words:
    """Read ``count`` words of ``bits`` bits back.

    Raises `ValueError` for another length or padding bits that are not 0.
    """
    kind = word_type(bits)
    if len(data) != packed_bytes(count, bits):
        raise ValueError(
            f"{len(data)} bytes; {count} words of {bits} bits take {packed_bytes(count, bits)}"
        )
    spare = 8 * len(data) - count * bits
    if spare and data[-1] >> (8 - spare):
        raise ValueError("padding bits are not zero")
    groups = -(-count // 64)
    padded = np.zeros(groups * bits * 8, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    lanes = np.ascontiguousarray(padded.view("<u8").reshape(groups, bits).T).astype(
        np.uint64, copy=False
    )
    columns = np.empty((64, groups), kind)
    low = np.uint64((1 << bits) - 1)
    for number in range(64):
        lane, shift = divmod(number * bits, 64)
        word = lanes[lane] >> np.uint64(shift)
        if shift + bits > 64:
            word |= lanes[lane + 1] << np.uint64(64 - shift)
        columns[number] = word & low
    return columns.T.reshape(-1)[:count].copy()


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` packed words."""
    return -(-count * bits // 8)
