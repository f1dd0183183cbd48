"""b1, b2 and b4: rotated, the nearest Gaussian level each, one unbiased scale a block.

DRIVE (arXiv 2105.08339) and EDEN (arXiv 2108.08842) with a Hadamard rotation: codes q of
y = H·D·x with scale ‖x‖²/⟨y, q⟩ give E[scale·D·H·q] = x. Blocks are those of
`dare_agg.codec.rotation`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dare_agg.codec.buffers import borrowed
from dare_agg.codec.rotation import column_sums, cut_blocks, flip_signs, hadamard
from dare_agg.codec.value_format import NOTHING, Bytes, ValueFormat, joined
from dare_agg.vectors.layout import FloatVector


class Levels(NamedTuple):
    """Levels by code, ascending, and the thresholds between them, for unit variance."""

    bits: int
    levels: FloatVector
    thresholds: FloatVector


def _gaussian(*positive: float) -> Levels:
    half = np.array(positive, np.float64)
    levels = np.concatenate([-half[::-1], half])
    thresholds = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    return Levels(levels.size.bit_length() - 1, levels.astype(np.float32), thresholds)


# Lloyd-Max levels of the standard normal distribution (J. Max, 1960), with the midpoints
# between neighbours as thresholds.
LEVELS = {
    "b4": _gaussian(0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
    "b2": _gaussian(0.4528, 1.510),
    "b1": _gaussian(1.0),
}


def _rotated(name: str, code: int, nmse: float) -> ValueFormat:
    bits, levels, thresholds = LEVELS[name]
    per_byte = 8 // bits
    # Row b holds the levels that the codes in byte b stand for, lowest bits first.
    byte_codes = np.arange(256)[:, None] >> (bits * np.arange(per_byte)) & ((1 << bits) - 1)
    byte_levels = levels[byte_codes]

    def pack(codes: Bytes, out: Bytes) -> None:
        if bits == 1:
            out[:] = np.packbits(codes, bitorder="little")
            return
        padded = np.zeros(out.size * per_byte, np.uint8)
        padded[: codes.size] = codes
        lanes = padded.reshape(-1, per_byte)
        out[:] = lanes[:, 0]
        for lane in range(1, per_byte):
            out |= lanes[:, lane] << np.uint8(bits * lane)

    def encode(
        values: FloatVector, keystream: Bytes | None, packed: Bytes
    ) -> tuple[FloatVector, FloatVector]:
        assert keystream is not None
        scales: list[FloatVector] = []
        rest = NOTHING
        size = rotated = values.size
        with borrowed(size) as work, borrowed(size) as spare, borrowed(size, np.uint8) as codes:
            work[:] = values
            for start, rows, columns in cut_blocks(size):
                stop = start + rows * columns
                if rows == 1:
                    rest, rotated = values[start:stop].astype("<f4"), start
                    continue
                block = work[start:stop].reshape(rows, columns)
                scratch = spare[start:stop].reshape(rows, columns)
                np.multiply(block, block, out=scratch)
                energy = column_sums(scratch)
                # start is a multiple of 8: every block length is.
                flip_signs(work[start:stop], keystream[start // 8 : -(-stop // 8)])
                if hadamard(block, scratch) is scratch:
                    block, scratch = scratch, block
                code = codes[start:stop].reshape(rows, columns)
                if bits == 1:
                    np.greater_equal(block, np.float32(0), out=code.view(np.bool_))
                    np.abs(block, out=scratch)
                else:
                    sigma = np.sqrt(energy)
                    code[...] = 0
                    for threshold in thresholds:
                        code += block >= threshold * sigma
                    levels.take(code, out=scratch, mode="clip")
                    scratch *= block
                product = column_sums(scratch)
                scale = np.zeros_like(energy)
                np.divide(energy, product, out=scale, where=product > 0)
                scales.append(scale)
            pack(codes[:rotated], packed)
        return joined(scales), rest

    def decode(
        codes: Bytes,
        scales: FloatVector,
        rest: FloatVector,
        out: FloatVector,
        keystream: Bytes | None,
    ) -> None:
        assert keystream is not None
        size, at = out.size, 0
        # A last byte may stand for more values than there are.
        with borrowed(size + per_byte) as unpacked, borrowed(size) as spare:
            whole = unpacked[: codes.size * per_byte]
            byte_levels.take(codes, axis=0, out=whole.reshape(-1, per_byte), mode="clip")
            for start, rows, columns in cut_blocks(size):
                stop = start + rows * columns
                if rows == 1:
                    out[start:stop] = rest
                    continue
                block = whole[start:stop].reshape(rows, columns)
                turned = hadamard(block, spare[start:stop].reshape(rows, columns))
                np.multiply(
                    turned, scales[at : at + columns], out=out[start:stop].reshape(rows, columns)
                )
                flip_signs(out[start:stop], keystream[start // 8 : -(-stop // 8)])
                at += columns

    return ValueFormat(
        name, code, bits, nmse, encode, decode,
        blocks=True, keystream_bytes=lambda count: -(-count // 8),
    )  # fmt: skip


ROWS = (_rotated("b4", 4, 0.0096), _rotated("b2", 5, 0.1331), _rotated("b1", 6, 0.5708))
# In these a value that is 0 arrives as noise of its block.
ROTATED = frozenset(row.name for row in ROWS)
