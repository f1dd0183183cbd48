"""The codec's inner loops, compiled by numba: the same bits as numpy's, in less time.

Imported by `dare_agg.codec.kernels` alone, and only when it pays. Every loop does the additions and
products of its numpy counterpart in the same order, without fused multiply-adds or fast math.
Those of values work on whole groups of 65,536 survivors; what is left of the last group goes
the way of numpy. Arrays are C-contiguous and little-endian; rows of a group are 64 columns.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from dare_agg.codec.buffers import borrowed
from dare_agg.codec.plain_formats import F16_END, encode_f16
from dare_agg.codec.rotated_formats import LEVELS
from dare_agg.codec.rotation import BLOCK, GROUP
from dare_agg.codec.value_format import NOTHING, Bytes, Decode, Encode
from dare_agg.vectors.layout import FloatVector

_COLUMNS = GROUP // BLOCK
_SIDE = 32
_TILE = _SIDE * _COLUMNS
# Survivors whose memory is asked for ahead of its use, where neighbours are far apart.
_AHEAD = 256
_FAR = 32
# Denominators of strides by tensor divide it.
_PATTERN = 1024

_F32, _U32, _I64, _U64 = types.float32, types.uint32, types.int64, types.uint64


def _read(dtype: Any) -> Any:
    return types.Array(dtype, 1, "C", readonly=True)


def _write(dtype: Any) -> Any:
    return types.Array(dtype, 1, "C")


def _compiled(*signature: Any, result: Any = types.void) -> Any:
    """Compile at once for one signature; kept on disk for the next process."""
    return njit(result(*signature), cache=True, nogil=True, error_model="numpy")


def _fetch_ahead(_: Any, array: Any, index: Any) -> Any:
    """Ask for ``array[index]`` to come into the second-level cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(function, [place, word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.void(array, index), generate


_fetch: Any = intrinsic(_fetch_ahead)


# --- masks and gathers ---------------------------------------------------------------------


@_compiled(_read(_U32), _I64, _I64, _I64, _write(_I64))
def draw_whole(words, begin, stride, rank, positions):  # type: ignore[no-untyped-def]
    """Survivors of strata of ``stride`` each, the first from element ``begin`` on."""
    width, turn = np.uint64(stride), np.uint64(rank % stride)
    start = np.uint64(begin)
    for i in range(words.size):
        drawn = ((np.uint64(words[i]) * width) >> np.uint64(32)) + turn
        drawn = drawn - width if drawn >= width else drawn
        positions[i] = np.int64(drawn + start + np.uint64(i) * width)


@_compiled(
    _read(_U32), _I64, _I64, _I64, _I64, _I64, _I64, _write(_I64), _write(_F32)
)  # fmt: skip
def draw_uneven(words, first, num, den, size, rank, origin, positions, widths):  # type: ignore[no-untyped-def]
    """Survivors of strata [⌊j·num/den⌋, ⌊(j+1)·num/den⌋) cut at ``size``, and their widths.

    Positions count from ``origin`` on.
    """
    whole, part = num // den, num % den
    lo, over = first * num // den, first * num % den
    turns = (rank % whole, rank % (whole + 1))
    for i in range(words.size):
        more = np.int64(over + part >= den)
        over += part - more * den
        width = whole + more
        turn = turns[1] if more else turns[0]
        if lo + width > size:
            width = size - lo
            turn = rank % width
        drawn = np.int64((np.uint64(words[i]) * np.uint64(width)) >> np.uint64(32)) + turn
        positions[i] = origin + lo + (drawn - width if drawn >= width else drawn)
        widths[i] = np.float32(width)
        lo += width


@njit(cache=True, nogil=True, error_model="numpy")
def _draw_row(words, widths, offsets, base, turn, positions):  # type: ignore[no-untyped-def]
    """Survivors of neighbouring strata, turned by less than a width."""
    for c in range(words.size):
        width = np.uint64(widths[c])
        drawn = ((np.uint64(words[c]) * width) >> np.uint64(32)) + turn
        drawn = drawn - width if drawn >= width else drawn
        positions[c] = np.int64(drawn) + offsets[c] + base


@_compiled(
    _read(_U32), _I64, _read(_I64), _read(_I64), _read(_I64), _read(_I64), _read(_I64),
    _read(_I64), _write(_I64), _write(_F32),
)  # fmt: skip
def draw_parts(words, first, starts, origins, sizes, nums, shifts, turns, positions, factors):  # type: ignore[no-untyped-def]
    """Survivors from number ``first`` on of parts with strides num/2**shift, and their widths.

    ``starts`` are the survivors before each part, one more than parts. So many strata as a
    pattern has lie as those before them.
    """
    offsets, widths = np.empty(_PATTERN, np.int64), np.empty(_PATTERN, np.int64)
    wide = np.empty(_PATTERN, np.float32)
    at = 0
    for part in range(nums.size):
        num, shift, turn, origin = nums[part], shifts[part], turns[part], origins[part]
        span = (_PATTERN * num) >> shift
        begin = first + at - starts[part]
        stop = at + min(words.size - at, starts[part + 1] - first - at)
        whole = stop
        if ((begin + stop - at) * num) >> shift > sizes[part]:
            whole -= 1
        known = min(_PATTERN, begin % _PATTERN + whole - at)
        for k in range(known):
            lo = (k * num) >> shift
            widths[k] = (((k + 1) * num) >> shift) - lo
            wide[k] = np.float32(widths[k])
            offsets[k] = origin + lo
        while at < whole:
            k = begin % _PATTERN
            count = min(_PATTERN - k, whole - at)
            _draw_row(
                words[at : at + count], widths[k : k + count], offsets[k : k + count],
                begin // _PATTERN * span, np.uint64(turn), positions[at : at + count],
            )  # fmt: skip
            factors[at : at + count] = wide[k : k + count]
            at += count
            begin += count
        if at < stop:
            # The last stratum is cut, maybe to less than the turn.
            lo = (begin * num) >> shift
            width = sizes[part] - lo
            drawn = np.int64((np.uint64(words[at]) * np.uint64(width)) >> np.uint64(32))
            positions[at] = origin + lo + (drawn + turn) % width
            factors[at] = np.float32(width)
            at += 1


@_compiled(_read(_I64), _read(_F32), _write(_F32))
def take(positions, vector, out):  # type: ignore[no-untyped-def]
    """``out = vector[positions]``"""
    last = positions.size - 1
    if last > 0 and positions[last] - positions[0] > _FAR * last:
        for i in range(positions.size):
            _fetch(vector, positions[min(i + _AHEAD, last)])
            out[i] = vector[positions[i]]
    else:
        for i in range(positions.size):
            out[i] = vector[positions[i]]


@_compiled(_read(_I64), _read(_F32), _read(_F32), _write(_F32))
def take_difference(positions, tuned, base, out):  # type: ignore[no-untyped-def]
    """``out = tuned[positions] − base[positions]``"""
    last = positions.size - 1
    if last > 0 and positions[last] - positions[0] > _FAR * last:
        for i in range(positions.size):
            ahead = positions[min(i + _AHEAD, last)]
            _fetch(tuned, ahead)
            _fetch(base, ahead)
            out[i] = tuned[positions[i]] - base[positions[i]]
    else:
        for i in range(positions.size):
            out[i] = tuned[positions[i]] - base[positions[i]]


@_compiled(_read(_I64), _I64, _read(_F32), _F32, _F32, _write(_F32))
def add_at(positions, lo, values, scale, weight, out):  # type: ignore[no-untyped-def]
    """``out[positions − lo] += (values·scale)·weight`` for distinct positions."""
    last = positions.size - 1
    if last > 0 and positions[last] - positions[0] > _FAR * last:
        for i in range(positions.size):
            _fetch(out, positions[min(i + _AHEAD, last)] - lo)
            out[positions[i] - lo] += (values[i] * scale) * weight
    else:
        for i in range(positions.size):
            out[positions[i] - lo] += (values[i] * scale) * weight


@_compiled(_read(_I64), _I64, _read(_F32), _write(_F32))
def put_at(positions, lo, values, out):  # type: ignore[no-untyped-def]
    """``out[positions − lo] = values``"""
    for i in range(positions.size):
        out[positions[i] - lo] = values[i]


@_compiled(_read(_F32), result=_U32)
def largest(values):  # type: ignore[no-untyped-def]
    """The largest magnitude as binary32 bits; beyond infinity's where there is a NaN."""
    bits = values.view(np.uint32)
    most = np.uint32(0)
    for i in range(bits.size):
        most = max(most, bits[i] & np.uint32(0x7FFFFFFF))
    return most


# --- binary16 ------------------------------------------------------------------------------


@_compiled(_read(_F32), _write(types.uint16))
def to_f16(values, codes):  # type: ignore[no-untyped-def]
    """Round magnitudes below 65520 to binary16, nearest even."""
    bits = values.view(np.uint32)
    for i in range(values.size):
        word = bits[i]
        size = word & np.uint32(0x7FFFFFFF)
        # Below 2**-14 a unit in the last place of 0.5 + |x| is that of a subnormal binary16.
        small = np.float32(abs(values[i]) + np.float32(0.5))
        low = np.float32(small - np.float32(0.5)) * np.float32(2.0**24)
        odd = np.uint32((size >> np.uint32(13)) & np.uint32(1))
        normal = np.uint32(size + np.uint32(0xC8000FFF) + odd) >> np.uint32(13)
        code = np.uint32(np.int32(low)) if size < np.uint32(0x38800000) else np.uint32(normal)
        codes[i] = np.uint16(code | ((word >> np.uint32(16)) & np.uint32(0x8000)))


@_compiled(_read(types.uint16), _write(_F32))
def from_f16(codes, values):  # type: ignore[no-untyped-def]
    """Finite binary16 as binary32."""
    bits = values.view(np.uint32)
    for i in range(codes.size):
        word = np.uint32(codes[i])
        size = word & np.uint32(0x7FFF)
        low = np.float32(np.int32(size)) * np.float32(2.0**-24)
        normal = np.uint32((size << np.uint32(13)) + np.uint32(0x38000000))
        values[i] = low
        chosen = bits[i] if size < np.uint32(0x400) else normal
        bits[i] = chosen | ((word & np.uint32(0x8000)) << np.uint32(16))


# --- i8 ------------------------------------------------------------------------------------


@_compiled(_read(_F32), _read(types.uint8), _write(types.int8), _write(_F32))
def encode_i8(values, dither, codes, scales):  # type: ignore[no-untyped-def]
    """One group (65,536 float32) to int8 codes and (64,) scales, one byte of ``dither`` a value."""
    inverse = np.empty(_COLUMNS, np.float32)
    scales[:] = 0
    for row in range(0, GROUP, _COLUMNS):
        for c in range(_COLUMNS):
            scales[c] = max(scales[c], abs(values[row + c]))
    for c in range(_COLUMNS):
        scales[c] = scales[c] / np.float32(127)
        usable = scales[c] > np.float32(2.0**-120)
        inverse[c] = np.float32(1) / scales[c] if usable else np.float32(0)
    for row in range(0, GROUP, _COLUMNS):
        for c in range(_COLUMNS):
            step = values[row + c] * inverse[c]
            shift = (np.float32(dither[row + c]) + np.float32(0.5)) * np.float32(1 / 256)
            step = np.float32(math.floor(np.float32(step + shift)))
            codes[row + c] = np.int8(max(np.float32(-127), min(np.float32(127), step)))


@_compiled(_read(types.int8), _read(_F32), _write(_F32))
def decode_i8(codes, scales, out):  # type: ignore[no-untyped-def]
    """A group of int8 codes times the (64,) scales of their blocks, into ``out``."""
    for row in range(0, GROUP, _COLUMNS):
        for c in range(_COLUMNS):
            out[row + c] = np.float32(codes[row + c]) * scales[c]


# --- rotation ------------------------------------------------------------------------------


@njit(cache=True, nogil=True, error_model="numpy")
def _turn(tile):  # type: ignore[no-untyped-def]
    """Levels of distance 16, 8, 4, 2 and 1 over the 32 rows of a tile, in place."""
    for start in range(0, 4 * _COLUMNS):
        # Distances 16, 8 and 4: rows start, start + 4, …, start + 28.
        a = tile[start]
        b = tile[start + 4 * _COLUMNS]
        c = tile[start + 8 * _COLUMNS]
        d = tile[start + 12 * _COLUMNS]
        e = tile[start + 16 * _COLUMNS]
        f = tile[start + 20 * _COLUMNS]
        g = tile[start + 24 * _COLUMNS]
        h = tile[start + 28 * _COLUMNS]
        a, b, c, d, e, f, g, h = a + e, b + f, c + g, d + h, a - e, b - f, c - g, d - h
        a, b, c, d, e, f, g, h = a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h
        tile[start] = a + b
        tile[start + 4 * _COLUMNS] = a - b
        tile[start + 8 * _COLUMNS] = c + d
        tile[start + 12 * _COLUMNS] = c - d
        tile[start + 16 * _COLUMNS] = e + f
        tile[start + 20 * _COLUMNS] = e - f
        tile[start + 24 * _COLUMNS] = g + h
        tile[start + 28 * _COLUMNS] = g - h
    for first in range(0, _TILE, 4 * _COLUMNS):
        for start in range(first, first + _COLUMNS):
            a = tile[start]
            b = tile[start + _COLUMNS]
            c = tile[start + 2 * _COLUMNS]
            d = tile[start + 3 * _COLUMNS]
            a, b, c, d = a + c, b + d, a - c, b - d
            tile[start] = a + b
            tile[start + _COLUMNS] = a - b
            tile[start + 2 * _COLUMNS] = c + d
            tile[start + 3 * _COLUMNS] = c - d


@njit(cache=True, nogil=True, error_model="numpy")
def _fold(tile, out, at):  # type: ignore[no-untyped-def]
    """Sum the 32 rows of a tile by halving into ``out[at:]``; destroys the tile."""
    for half in (16, 8, 4, 2, 1):
        for i in range(half * _COLUMNS):
            tile[i] = tile[i] + tile[i + half * _COLUMNS]
    for c in range(_COLUMNS):
        out[at + c] = tile[c]


@njit(cache=True, nogil=True, error_model="numpy")
def _rotate(values, signs, work):  # type: ignore[no-untyped-def]
    """First half of the rotation, from values to ``work``; returns the columns' energies."""
    tile, squares = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    bits = tile.view(np.uint32)
    sums, energy = np.empty(_TILE, np.float32), np.empty(_COLUMNS, np.float32)
    for i in range(_SIDE):
        for k in range(_SIDE):
            row = _SIDE * k + i
            at, to = row * _COLUMNS, k * _COLUMNS
            flips = signs[row]
            for c in range(_COLUMNS):
                x = values[at + c]
                squares[to + c] = x * x
                tile[to + c] = x
            for c in range(_COLUMNS):
                flip = np.uint32((flips >> np.uint64(c)) & np.uint64(1)) << np.uint32(31)
                bits[to + c] ^= np.uint32(flip)
        _fold(squares, sums, i * _COLUMNS)
        _turn(tile)
        for k in range(_SIDE):
            at, to = (_SIDE * k + i) * _COLUMNS, k * _COLUMNS
            for c in range(_COLUMNS):
                work[at + c] = tile[to + c]
    _fold(sums, energy, 0)
    return energy


@njit(cache=True, nogil=True, error_model="numpy")
def _scale(energy, sums, scales):  # type: ignore[no-untyped-def]
    product = np.empty(_COLUMNS, np.float32)
    _fold(sums, product, 0)
    for c in range(_COLUMNS):
        scales[c] = energy[c] / product[c] if product[c] > 0 else np.float32(0)


@_compiled(_read(_F32), _read(_U64), _write(_F32), _write(_U64), _write(_F32))
def encode_b1(values, signs, work, codes, scales):  # type: ignore[no-untyped-def]
    """A group, rotated, to one sign bit a value ((1024,) uint64 codes) and (64,) scales."""
    energy = _rotate(values, signs, work)
    tile, sums = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for a in range(_SIDE):
        tile[:] = work[a * _TILE : (a + 1) * _TILE]
        _turn(tile)
        for b in range(_SIDE):
            word = np.uint64(0)
            for c in range(_COLUMNS):
                up = np.uint64(tile[b * _COLUMNS + c] >= np.float32(0))
                word |= up << np.uint64(c)
            codes[_SIDE * b + a] = word
        for i in range(_TILE):
            tile[i] = abs(tile[i])
        _fold(tile, sums, a * _COLUMNS)
    _scale(energy, sums, scales)


@_compiled(
    _read(_F32), _read(_U64), _write(_F32), _read(_F32), _read(_F32), _I64, _write(types.uint8),
    _write(_F32),
)  # fmt: skip
def encode_levels(values, signs, work, levels, thresholds, bits, codes, scales):  # type: ignore[no-untyped-def]
    """A group, rotated, to the nearest of 2**``bits`` levels: packed codes, (64,) scales."""
    energy = _rotate(values, signs, work)
    deviation = np.sqrt(energy)
    tile, sums = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    code = np.empty(_COLUMNS, np.uint8)
    each = 8 // bits
    for a in range(_SIDE):
        tile[:] = work[a * _TILE : (a + 1) * _TILE]
        _turn(tile)
        for b in range(_SIDE):
            at = b * _COLUMNS
            code[:] = 0
            for t in range(thresholds.size):
                for c in range(_COLUMNS):
                    code[c] += np.uint8(tile[at + c] >= thresholds[t] * deviation[c])
            for c in range(_COLUMNS):
                tile[at + c] = tile[at + c] * levels[code[c]]
            to = (_SIDE * b + a) * _COLUMNS // each
            for i in range(_COLUMNS // each):
                byte = np.uint32(0)
                for lane in range(each):
                    byte |= np.uint32(code[each * i + lane]) << np.uint32(bits * lane)
                codes[to + i] = np.uint8(byte)
        _fold(tile, sums, a * _COLUMNS)
    _scale(energy, sums, scales)


@njit(cache=True, nogil=True, error_model="numpy")
def _unrotate(work, scales, signs, out):  # type: ignore[no-untyped-def]
    """Second half of the rotation, from ``work`` to values."""
    tile = np.empty(_TILE, np.float32)
    bits = out.view(np.uint32)
    for a in range(_SIDE):
        tile[:] = work[a * _TILE : (a + 1) * _TILE]
        _turn(tile)
        for b in range(_SIDE):
            row = _SIDE * b + a
            at, to = b * _COLUMNS, row * _COLUMNS
            flips = signs[row]
            for c in range(_COLUMNS):
                out[to + c] = tile[at + c] * scales[c]
            for c in range(_COLUMNS):
                flip = np.uint32((flips >> np.uint64(c)) & np.uint64(1)) << np.uint32(31)
                bits[to + c] ^= np.uint32(flip)


@_compiled(_read(_U64), _read(_F32), _read(_U64), _write(_F32), _write(_F32))
def decode_b1(codes, scales, signs, work, out):  # type: ignore[no-untyped-def]
    """The group that `encode_b1` wrote: ±1 turned back and scaled, into ``out``."""
    tile = np.empty(_TILE, np.float32)
    for i in range(_SIDE):
        for k in range(_SIDE):
            word = codes[_SIDE * k + i]
            for c in range(_COLUMNS):
                up = np.int32((word >> np.uint64(c)) & np.uint64(1))
                tile[k * _COLUMNS + c] = np.float32(up + up - np.int32(1))
        _turn(tile)
        for k in range(_SIDE):
            at, to = (_SIDE * k + i) * _COLUMNS, k * _COLUMNS
            for c in range(_COLUMNS):
                work[at + c] = tile[to + c]
    _unrotate(work, scales, signs, out)


@_compiled(
    _read(types.uint8), _read(_F32), _read(_U64), _read(_F32), _I64, _write(_F32), _write(_F32)
)
def decode_levels(codes, scales, signs, levels, bits, work, out):  # type: ignore[no-untyped-def]
    """The group that `encode_levels` wrote: levels turned back and scaled, into ``out``."""
    tile = np.empty(_TILE, np.float32)
    each = 8 // bits
    low = np.uint32((1 << bits) - 1)
    for i in range(_SIDE):
        for k in range(_SIDE):
            at = (_SIDE * k + i) * _COLUMNS // each
            for j in range(_COLUMNS // each):
                byte = np.uint32(codes[at + j])
                for lane in range(each):
                    code = (byte >> np.uint32(bits * lane)) & low
                    tile[k * _COLUMNS + each * j + lane] = levels[code]
        _turn(tile)
        for k in range(_SIDE):
            at, to = (_SIDE * k + i) * _COLUMNS, k * _COLUMNS
            for c in range(_COLUMNS):
                work[at + c] = tile[to + c]
    _unrotate(work, scales, signs, out)


# --- as rows of the table of value formats --------------------------------------------------

_F16_END = int(F16_END.view(np.uint32))


def _words(keystream: Bytes) -> NDArray[np.uint64]:
    """The signs of a group as one word a row."""
    return np.require(keystream, requirements="A").view(np.uint64)


def _encode_f16(
    values: FloatVector, keystream: Bytes | None, room: Bytes
) -> tuple[FloatVector, FloatVector]:
    if largest(values) >= _F16_END:
        return encode_f16(values, keystream, room)  # says what is wrong
    with borrowed(GROUP, np.uint16) as codes:
        to_f16(values, codes)
        room[:] = codes.view(np.uint8)
    return NOTHING, NOTHING


def _decode_f16(
    room: Bytes, _s: FloatVector, _r: FloatVector, out: FloatVector, _k: Bytes | None
) -> None:
    with borrowed(GROUP, np.uint16) as codes:
        codes.view(np.uint8)[:] = room
        from_f16(codes, out)


def _encode_i8(
    values: FloatVector, keystream: Bytes | None, room: Bytes
) -> tuple[FloatVector, FloatVector]:
    scales = np.empty(_COLUMNS, np.float32)
    encode_i8(values, keystream, room.view(np.int8), scales)
    return scales, NOTHING


def _decode_i8(
    room: Bytes, scales: FloatVector, _r: FloatVector, out: FloatVector, _k: Bytes | None
) -> None:
    decode_i8(room.view(np.int8), scales, out)


def _encode_b1(
    values: FloatVector, keystream: Bytes | None, room: Bytes
) -> tuple[FloatVector, FloatVector]:
    assert keystream is not None
    scales = np.empty(_COLUMNS, np.float32)
    with borrowed(GROUP) as work, borrowed(BLOCK, np.uint64) as codes:
        encode_b1(values, _words(keystream), work, codes, scales)
        room[:] = codes.view(np.uint8)
    return scales, NOTHING


def _decode_b1(
    room: Bytes, scales: FloatVector, _: FloatVector, out: FloatVector, keystream: Bytes | None
) -> None:
    assert keystream is not None
    with borrowed(GROUP) as work, borrowed(BLOCK, np.uint64) as codes:
        codes.view(np.uint8)[:] = room
        decode_b1(codes, scales, _words(keystream), work, out)


def _rotated(name: str) -> tuple[Encode, Decode]:
    bits, levels, thresholds = LEVELS[name]

    def encode(
        values: FloatVector, keystream: Bytes | None, room: Bytes
    ) -> tuple[FloatVector, FloatVector]:
        assert keystream is not None
        scales = np.empty(_COLUMNS, np.float32)
        with borrowed(GROUP) as work:
            encode_levels(values, _words(keystream), work, levels, thresholds, bits, room, scales)
        return scales, NOTHING

    def decode(
        room: Bytes, scales: FloatVector, _: FloatVector, out: FloatVector, keystream: Bytes | None
    ) -> None:
        assert keystream is not None
        with borrowed(GROUP) as work:
            decode_levels(room, scales, _words(keystream), levels, bits, work, out)

    return encode, decode


# Encoder and decoder of whole groups by the format's name; what is missing is as fast in numpy.
GROUPS: dict[str, tuple[Encode, Decode]] = {
    "f16": (_encode_f16, _decode_f16),
    "i8": (_encode_i8, _decode_i8),
    "b4": _rotated("b4"),
    "b2": _rotated("b2"),
    "b1": (_encode_b1, _decode_b1),
}
