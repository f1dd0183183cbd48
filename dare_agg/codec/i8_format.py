"""i8: one scale a block, ⌊x·127/max|x| + dither⌋ each, unbiased."""

from __future__ import annotations

import numpy as np

from dare_agg.codec.buffers import borrowed
from dare_agg.codec.rotation import cut_blocks
from dare_agg.codec.value_format import NOTHING, Bytes, ValueFormat, joined
from dare_agg.errors import UpdateError
from dare_agg.vectors.layout import FloatVector


def _encode_i8(
    values: FloatVector, keystream: Bytes | None, codes: Bytes
) -> tuple[FloatVector, FloatVector]:
    assert keystream is not None
    scales: list[FloatVector] = []
    rest = NOTHING
    with borrowed(values.size) as dither, borrowed(values.size) as spare:
        # Dither in (0, 1): 256 equal steps, so rounding is unbiased up to 2**-9 of a step.
        dither[:] = keystream
        dither += np.float32(0.5)
        dither *= np.float32(1 / 256)
        for start, rows, columns in cut_blocks(values.size):
            stop = start + rows * columns
            if rows == 1:
                rest = values[start:stop].astype("<f4")
                continue
            block = values[start:stop].reshape(rows, columns)
            steps = spare[start:stop].reshape(rows, columns)
            scale = np.abs(block, out=steps).max(axis=0) / np.float32(127)
            inverse = np.zeros_like(scale)
            np.divide(np.float32(1), scale, out=inverse, where=scale > 2.0**-120)
            np.multiply(block, inverse, out=steps)
            steps += dither[start:stop].reshape(rows, columns)
            np.floor(steps, out=steps)
            np.clip(steps, -127, 127, out=steps)
            codes[start:stop].view(np.int8)[:] = steps.reshape(-1)
            scales.append(scale)
    return joined(scales), rest


def _decode_i8(
    codes: Bytes, scales: FloatVector, rest: FloatVector, out: FloatVector, _k: Bytes | None
) -> None:
    at = 0
    for start, rows, columns in cut_blocks(out.size):
        stop = start + rows * columns
        if rows == 1:
            out[start:stop] = rest
            continue
        block = out[start:stop].reshape(rows, columns)
        block[:] = codes[start:stop].view(np.int8).reshape(rows, columns)
        block *= scales[at : at + columns]
        at += columns


def _check_codes(codes: Bytes, _: int, _most: np.float32) -> None:
    if int(codes.view(np.int8).min()) == -128:
        raise UpdateError("i8 code -128; codes run from -127 to 127", reason="malformed")


ROW = ValueFormat(
    "i8", 3, 8, 1.2e-4, _encode_i8, _decode_i8,
    blocks=True, keystream_bytes=lambda count: count, check_codes=_check_codes,
)  # fmt: skip
