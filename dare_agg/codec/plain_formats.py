"""f32, f16 and bf16: each survivor by itself, in 32 or 16 bits, without scales."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dare_agg.codec.value_format import NOTHING, Bytes, Decode, ValueFormat, check_magnitude
from dare_agg.errors import NonFiniteError
from dare_agg.vectors.layout import FloatVector

Coded = tuple[FloatVector, FloatVector]

# From here on a value rounds to infinity in binary16.
F16_END = np.float32(65520)


def _encode_f32(values: FloatVector, _: Bytes | None, codes: Bytes) -> Coded:
    codes.view("<f4")[:] = values
    return NOTHING, NOTHING


def _decode_f32(
    codes: Bytes, _s: FloatVector, _r: FloatVector, out: FloatVector, _k: Bytes | None
) -> None:
    out[:] = codes.view("<f4")


def encode_f16(values: FloatVector, _: Bytes | None, codes: Bytes) -> Coded:
    """Round each value to binary16; `NonFiniteError` for what would become infinite."""
    if values.size and not (values.max() < F16_END and values.min() > -F16_END):
        worst = float(np.abs(values).max())
        raise NonFiniteError(
            f"a value of magnitude {worst:g} does not fit f16 (at most 65504); use bf16 or f32"
        )
    codes.view("<f2")[:] = values
    return NOTHING, NOTHING


def _decode_f16(
    codes: Bytes, _s: FloatVector, _r: FloatVector, out: FloatVector, _k: Bytes | None
) -> None:
    out[:] = codes.view("<f2")


def _encode_bf16(values: FloatVector, _: Bytes | None, codes: Bytes) -> Coded:
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    codes.view("<u2")[:] = rounded >> np.uint32(16)
    return NOTHING, NOTHING


def _decode_bf16(
    codes: Bytes, _s: FloatVector, _r: FloatVector, out: FloatVector, _k: Bytes | None
) -> None:
    bits = out.view(np.uint32)
    bits[:] = codes.view("<u2")
    bits <<= np.uint32(16)


def check_ends(
    dtype: str, end: Callable[[np.float32], int], decode: Decode
) -> Callable[[Bytes, int, np.float32], None]:
    """A check of codes whose magnitude goes up with the code: none may be above ``end(most)``."""
    size = np.dtype(dtype).itemsize
    sign = np.array(1 << (8 * size - 1), dtype)

    def check(codes: Bytes, first: int, most: np.float32) -> None:
        if (codes.view(dtype) & ~sign).max() > end(most):
            values = np.empty(codes.size // size, np.float32)
            decode(codes, NOTHING, NOTHING, values, None)
            check_magnitude(values, first, most)

    return check


# The codes of the largest magnitude that is allowed, a power of two.
def _end_f32(most: np.float32) -> int:
    return int(most.view(np.uint32))


def _end_f16(most: np.float32) -> int:
    return int(np.float16(min(most, np.float32(65504))).view(np.uint16))


def _end_bf16(most: np.float32) -> int:
    return int(most.view(np.uint32)) >> 16


ROWS = (
    ValueFormat(
        "f32", 0, 32, 0.0, _encode_f32, _decode_f32,
        check_codes=check_ends("<u4", _end_f32, _decode_f32),
    ),
    ValueFormat(
        "f16", 1, 16, 4.3e-8, encode_f16, _decode_f16,
        check_codes=check_ends("<u2", _end_f16, _decode_f16),
    ),
    ValueFormat(
        "bf16", 2, 16, 2.8e-6, _encode_bf16, _decode_bf16,
        check_codes=check_ends("<u2", _end_bf16, _decode_bf16),
    ),
)  # fmt: skip
