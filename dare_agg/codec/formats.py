"""Value formats: how the survivors of an update are written as bytes.

========  ====  =========================================================================
name      bits  rule
========  ====  =========================================================================
f32       32    IEEE 754 binary32
f16       16    IEEE 754 binary16, nearest
bf16      16    the upper half of binary32, nearest even
i8        8     per block ⌊x·127/max|x| + dither⌋, unbiased
b4 b2     4 2   rotated, nearest Gaussian level, one unbiased scale a block
b1        1     rotated, sign, one unbiased scale a block
========  ====  =========================================================================

A payload holds the codes of all survivors in order, then one float32 scale a block, then
(i8 and b* only) the unrotated rest as float32. The rotated formats are DRIVE (arXiv
2105.08339) and EDEN (arXiv 2108.08842) with a Hadamard rotation: codes q of y = H·D·x with
scale ‖x‖²/⟨y, q⟩ give E[scale·D·H·q] = x. Blocks are those of `dare_agg.codec.rotation`.

Nothing here depends on libm, BLAS or a library's random generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.buffers import borrowed
from dare_agg.codec.kernels import compiled
from dare_agg.codec.rotation import (
    GROUP,
    column_sums,
    cut_blocks,
    flip_signs,
    hadamard,
)
from dare_agg.errors import ConfigError, NonFiniteError, did_you_mean
from dare_agg.vectors.layout import FloatVector

Bytes = NDArray[np.uint8]

# Values beyond this are refused: rescaling and summing them could overflow float32.
MAX_MAGNITUDE = np.float32(2.0**60)

# From here on a value rounds to infinity in binary16.
_F16_END = np.float32(65520)

# Codes of the largest magnitude allowed, 2**60 or (f16) the largest there is.
_PLAIN_ENDS = {"f32": ("<u4", 0x5D800000), "bf16": ("<u2", 0x5D80), "f16": ("<u2", 0x7BFF)}

# Lloyd-Max levels of the standard normal distribution (positive half; J. Max, 1960), with
# the midpoints between neighbours as thresholds.
_LEVELS = {
    1: (1.0,),
    2: (0.4528, 1.510),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}


@dataclass(frozen=True)
class ValueFormat:
    """One row: name, wire code, bits a value, and whether it has blocks and scales.

    ``nmse`` is the format's own expected squared error relative to the squared value; the
    error of an update at drop rate p is (1 + nmse)/(1 − p) − 1.
    """

    name: str
    code: int
    bits: int
    blocks: bool
    nmse: float
    encode_group: Callable[[FloatVector, Bytes | None, Bytes], tuple[FloatVector, FloatVector]]
    decode_group: Callable[[Bytes, FloatVector, FloatVector, FloatVector, Bytes | None], None]
    keystream_bytes: Callable[[int], int]


# Encoders take (values, keystream, room for the codes) and return (scales, rest); decoders
# take (codes, scales, rest, room for the values, keystream).

# --- plain formats -------------------------------------------------------------------------

_NOTHING = np.empty(0, np.float32)


def _encode_f32(
    values: FloatVector, _: Bytes | None, codes: Bytes
) -> tuple[FloatVector, FloatVector]:
    codes.view("<f4")[:] = values
    return _NOTHING, _NOTHING


def _decode_f32(
    codes: Bytes, _s: FloatVector, _r: FloatVector, out: FloatVector, _k: Bytes | None
) -> None:
    out[:] = codes.view("<f4")


def _encode_f16(
    values: FloatVector, _: Bytes | None, codes: Bytes
) -> tuple[FloatVector, FloatVector]:
    if values.size and not (values.max() < _F16_END and values.min() > -_F16_END):
        worst = float(np.abs(values).max())
        raise NonFiniteError(
            f"a value of magnitude {worst:g} does not fit f16 (at most 65504); use bf16 or f32"
        )
    codes.view("<f2")[:] = values
    return _NOTHING, _NOTHING


def _decode_f16(
    codes: Bytes, _s: FloatVector, _r: FloatVector, out: FloatVector, _k: Bytes | None
) -> None:
    out[:] = codes.view("<f2")


def _encode_bf16(
    values: FloatVector, _: Bytes | None, codes: Bytes
) -> tuple[FloatVector, FloatVector]:
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    codes.view("<u2")[:] = rounded >> np.uint32(16)
    return _NOTHING, _NOTHING


def _decode_bf16(
    codes: Bytes, _s: FloatVector, _r: FloatVector, out: FloatVector, _k: Bytes | None
) -> None:
    bits = out.view(np.uint32)
    bits[:] = codes.view("<u2")
    bits <<= np.uint32(16)


# --- i8 ------------------------------------------------------------------------------------


def _encode_i8(
    values: FloatVector, keystream: Bytes | None, codes: Bytes
) -> tuple[FloatVector, FloatVector]:
    assert keystream is not None
    scales: list[FloatVector] = []
    rest = _NOTHING
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
    return _joined(scales), rest


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


# --- rotated formats -----------------------------------------------------------------------


def gaussian_levels(bits: int) -> tuple[FloatVector, FloatVector]:
    """Levels by code (ascending) and the thresholds between them, for unit variance."""
    half = np.array(_LEVELS[bits], np.float64)
    levels = np.concatenate([-half[::-1], half])
    return levels.astype(np.float32), ((levels[1:] + levels[:-1]) / 2).astype(np.float32)


def _rotated(bits: int) -> tuple[Callable, Callable]:
    levels, thresholds = gaussian_levels(bits)
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
        rest = _NOTHING
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
        return _joined(scales), rest

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

    return encode, decode


def _joined(parts: list[FloatVector]) -> FloatVector:
    return np.concatenate(parts).astype("<f4") if parts else _NOTHING


def _no_keystream(_: int) -> int:
    return 0


def _bit_each(count: int) -> int:
    return -(-count // 8)


def _byte_each(count: int) -> int:
    return count


VALUE_FORMATS: dict[str, ValueFormat] = {
    row.name: row
    for row in (
        ValueFormat("f32", 0, 32, False, 0.0, _encode_f32, _decode_f32, _no_keystream),
        ValueFormat("f16", 1, 16, False, 4.3e-8, _encode_f16, _decode_f16, _no_keystream),
        ValueFormat("bf16", 2, 16, False, 2.8e-6, _encode_bf16, _decode_bf16, _no_keystream),
        ValueFormat("i8", 3, 8, True, 1.2e-4, _encode_i8, _decode_i8, _byte_each),
        ValueFormat("b4", 4, 4, True, 0.0096, *_rotated(4), _bit_each),
        ValueFormat("b2", 5, 2, True, 0.1331, *_rotated(2), _bit_each),
        ValueFormat("b1", 6, 1, True, 0.5708, *_rotated(1), _bit_each),
    )
}


def find_values(name: str) -> ValueFormat:
    """Return the row of a value format; an unknown name raises `ConfigError`."""
    if name not in VALUE_FORMATS:
        raise ConfigError(f"value format {name!r} is unknown{did_you_mean(name, VALUE_FORMATS)}")
    return VALUE_FORMATS[name]


def check_magnitude(values: FloatVector, first: int, what: str = "survivor") -> None:
    """Raise `NonFiniteError` unless all values are finite and at most 2**60 in magnitude."""
    if not values.size:
        return
    loops = compiled()
    if (
        loops is not None
        and values.size == GROUP
        and loops.largest(values) <= _PLAIN_ENDS["f32"][1]
    ):
        return
    # NaN fails every comparison, so it is caught too.
    if values.max() <= MAX_MAGNITUDE and values.min() >= -MAX_MAGNITUDE:
        return
    good = np.abs(values) <= MAX_MAGNITUDE
    at = int(np.argmin(good))
    raise NonFiniteError(
        f"{what} number {first + at} is {values[at]:g}; only finite values of magnitude <= 2**60 "
        "are allowed: check the training step (learning rate, overflow)"
    )
