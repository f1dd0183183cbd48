"""The payload of an update or a step: the codes of all survivors, scales, and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from dare_agg.codec.derive import Keystream
from dare_agg.codec.formats import find_values
from dare_agg.codec.rotation import BLOCK, GROUP, count_blocks
from dare_agg.codec.value_format import (
    MAX_MAGNITUDE,
    NOTHING,
    Bytes,
    ValueFormat,
    check_magnitude,
)
from dare_agg.errors import ConfigError, UpdateError
from dare_agg.files.pages import Pages
from dare_agg.vectors.layout import FloatVector


@dataclass(frozen=True)
class Sections:
    """Where the parts of a payload of so many survivors lie, in bytes."""

    codes: int
    scales: int
    rest: int

    @property
    def total(self) -> int:
        """Bytes of the whole payload."""
        return self.codes + self.scales + self.rest


def payload_sections(name: str, survivors: int) -> Sections:
    """Return the exact sizes of a payload's sections."""
    row = find_values(name)
    if not row.blocks:
        return Sections(survivors * row.bits // 8, 0, 0)
    blocks, rest = count_blocks(survivors)
    return Sections(-(-(survivors - rest) * row.bits // 8), 4 * blocks, 4 * rest)


def payload_bytes(name: str, survivors: int) -> int:
    """Return the exact number of bytes that so many survivors take, without a header."""
    return payload_sections(name, survivors).total


def encode_values(
    name: str,
    groups: Iterator[FloatVector],
    survivors: int,
    key: bytes,
    out: memoryview,
    first_group: int = 0,
    most: np.float32 = MAX_MAGNITUDE,
) -> int:
    """Write groups of a payload to ``out``, of `payload_bytes` bytes; return how many values.

    ``groups`` yields the survivors' values from group ``first_group`` on, in pieces of exactly
    `GROUP`, the last one shorter where it is the last of all. Groups may be written in any
    order and by several threads. Raises `NonFiniteError` for what `check_payload` would refuse:
    a NaN, an infinity, a magnitude or 1024 scales above ``most``.
    """
    row = find_values(name)
    sections = payload_sections(name, survivors)
    target = np.frombuffer(out, np.uint8)
    if target.size != sections.total:
        raise ConfigError(f"{target.size} bytes of room; {sections.total} are needed")
    stream = Keystream(key) if row.keystream_bytes(1) else None
    written = 0
    for number, values in enumerate(groups, first_group):
        at = number * GROUP
        if values.size != min(GROUP, survivors - at):
            raise ConfigError(
                f"group {number} of {values.size} values; {survivors} survivors were announced"
            )
        room = target[at * row.bits // 8 :][: _code_bytes(row, values.size)]
        scales, rest = _encode_group(row, stream, values, number, room, most)
        scale_at = sections.codes + 4 * (at // BLOCK)
        target[scale_at : scale_at + 4 * scales.size] = scales.view(np.uint8)
        rest_at = sections.codes + sections.scales
        target[rest_at : rest_at + 4 * rest.size] = rest.view(np.uint8)
        written += values.size
    return written


def _encode_group(
    row: ValueFormat,
    stream: Keystream | None,
    values: FloatVector,
    number: int,
    room: Bytes,
    most: np.float32,
) -> tuple[FloatVector, FloatVector]:
    """Write the codes of group ``number`` to ``room``; return its scales and rest, as they lie."""
    at = number * GROUP
    check_magnitude(values, at, most)
    keystream = None
    if stream is not None:
        start = number * row.keystream_bytes(GROUP)
        keystream = stream.read(start, row.keystream_bytes(values.size))
    encode, _ = row.coder(values.size)
    scales, rest = encode(values, keystream, room)
    _check_scales(scales, at // BLOCK, most)
    return scales, rest


def _code_bytes(row: ValueFormat, count: int) -> int:
    """Bytes of the codes of a group of so many values."""
    coded = count - (count_blocks(count)[1] if row.blocks else 0)
    return -(-coded * row.bits // 8)


def decode_values(
    name: str,
    payload: Bytes,
    survivors: int,
    key: bytes,
    group: int,
) -> FloatVector:
    """Return group number ``group`` (of `GROUP` survivors) of a checked payload."""
    row = find_values(name)
    sections = payload_sections(name, survivors)
    first = group * GROUP
    count = min(GROUP, survivors - first)
    scales = rest = NOTHING
    if row.blocks:
        blocks, left = count_blocks(count)
        lo = sections.codes + 4 * group * (GROUP // BLOCK)
        scales = payload[lo : lo + 4 * blocks].copy().view("<f4").astype(np.float32)
        if left:
            lo = sections.codes + sections.scales
            rest = payload[lo : lo + 4 * left].copy().view("<f4").astype(np.float32)
    codes = payload[first * row.bits // 8 :][: _code_bytes(row, count)]
    stream = Keystream(key) if row.keystream_bytes(1) else None
    return _decode_group(row, stream, codes, scales, rest, count, group)


def _decode_group(
    row: ValueFormat,
    stream: Keystream | None,
    codes: Bytes,
    scales: FloatVector,
    rest: FloatVector,
    count: int,
    group: int,
) -> FloatVector:
    keystream = None
    if stream is not None:
        start = group * row.keystream_bytes(GROUP)
        keystream = stream.read(start, row.keystream_bytes(count))
    values = np.empty(count, np.float32)
    _, decode = row.coder(count)
    decode(codes, scales, rest, values, keystream)
    return values


def _check_scales(scales: FloatVector, first: int, most: np.float32) -> None:
    # A code stands for at most 127 (i8), 1024 (b1) or, at the worst, 2,799 (b4) scales.
    with np.errstate(over="ignore", invalid="ignore"):
        check_magnitude(scales * np.float32(BLOCK), first, most, what="1024 times scale")


def check_payload(
    name: str,
    payload: Bytes,
    survivors: int,
    pages: Pages | None = None,
    most: np.float32 = MAX_MAGNITUDE,
) -> None:
    """Refuse a payload of the right size whose contents are out of bounds.

    Raises `NonFiniteError` for values, or 1024 scales, that are NaN, infinite or above ``most``,
    `UpdateError` for negative scales, codes that the format has not, and padding bits that are
    not 0.
    """
    row = find_values(name)
    sections = payload_sections(name, survivors)
    numbers = payload[sections.codes :].copy().view("<f4")
    scales = numbers[: sections.scales // 4]
    _check_scales(scales, 0, most)
    check_magnitude(numbers[scales.size :], survivors - sections.rest // 4, most)
    if np.signbit(scales).any():
        raise UpdateError(
            f"scale number {int(np.argmax(np.signbit(scales)))} is negative; scales are >= 0",
            reason="malformed",
        )
    codes = payload[: sections.codes]
    if row.check_codes is not None:
        each = GROUP * row.bits // 8
        for number, at in enumerate(range(0, codes.size, each)):
            piece = codes[at : at + each]
            row.check_codes(piece, number * GROUP, most)
            if pages is not None:
                pages.passed(piece.size)
    used = (survivors - sections.rest // 4) * row.bits % 8
    if used and int(codes[-1]) >> used:
        raise UpdateError("padding bits of the last code byte are not 0", reason="malformed")


def regrouped(pieces: Iterable[FloatVector]) -> Iterator[FloatVector]:
    """Join pieces of any length into groups of exactly `GROUP`; the last may be shorter.

    A group is valid until the next one is asked for.
    """
    group = np.empty(GROUP, np.float32)
    filled = 0
    for piece in pieces:
        while piece.size:
            take = min(piece.size, GROUP - filled)
            group[filled : filled + take] = piece[:take]
            filled += take
            piece = piece[take:]
            if filled == GROUP:
                yield group
                filled = 0
    if filled:
        yield group[:filled]


def encode_payload(name: str, pieces: Iterable[FloatVector], count: int, key: bytes) -> bytes:
    """Encode ``count`` values, which come in pieces of any size, in a format of the codec."""
    out = bytearray(payload_bytes(name, count))
    encode_values(name, regrouped(pieces), count, key, memoryview(out))
    return bytes(out)


class PayloadWriter:
    """Encodes values whose number is not known yet, and says what each group decodes to.

    The bytes are those of `encode_payload`. A format's keystream is read once for both ways.
    """

    def __init__(self, name: str, key: bytes) -> None:
        self._row, self._key = find_values(name), key
        self._group, self._filled = np.empty(GROUP, np.float32), 0
        self._codes = bytearray()
        self._scales: list[bytes] = []
        self._rest = b""
        self._number = 0
        self.count = 0

    def add(self, values: FloatVector) -> Iterator[FloatVector]:
        """Take the next values; yields what was decoded of each group that they filled."""
        at = 0
        while at < values.size:
            piece = values[at : at + GROUP - self._filled]
            self._group[self._filled : self._filled + piece.size] = piece
            self._filled += piece.size
            at += piece.size
            if self._filled == GROUP:
                yield self._encode()

    def finish(self) -> Iterator[FloatVector]:
        """End the payload; yields what was decoded of the last group, where it has values."""
        if self._filled:
            yield self._encode()

    def payload(self) -> bytes:
        """The finished payload."""
        return b"".join((self._codes, *self._scales, self._rest))

    def _encode(self) -> FloatVector:
        row, values = self._row, self._group[: self._filled]
        stream = Keystream(self._key) if row.keystream_bytes(1) else None
        codes = np.empty(_code_bytes(row, values.size), np.uint8)
        scales, rest = _encode_group(row, stream, values, self._number, codes, MAX_MAGNITUDE)
        decoded = _decode_group(row, stream, codes, scales, rest, values.size, self._number)
        self._codes += codes.tobytes()
        self._scales.append(scales.astype("<f4").tobytes())
        self._rest = rest.astype("<f4").tobytes()
        self.count += values.size
        self._number += 1
        self._filled = 0
        return decoded


class PayloadReader:
    """Decodes ``count`` values piece by piece, holding no more than a piece and a group.

    Raises `UpdateError` for a payload that cannot be right.
    """

    def __init__(self, name: str, payload: bytes, count: int, key: bytes) -> None:
        if len(payload) != payload_bytes(name, count):
            raise UpdateError(
                f"step payload of {len(payload)} bytes, {payload_bytes(name, count)} are due",
                reason="truncated",
            )
        self._data = np.frombuffer(payload, np.uint8)
        check_payload(name, self._data, count)
        self._name, self._count, self._key = name, count, key
        self._group, self._rest = 0, np.empty(0, np.float32)
        self.left = count

    def take(self, count: int) -> FloatVector:
        """Return the next ``count`` values, shape (count,)."""
        if count > self.left:
            raise UpdateError("step holds fewer values than its masks keep", reason="mask")
        self.left -= count
        taken = np.empty(count, np.float32)
        at = 0
        while at < count:
            if not self._rest.size:
                self._rest = decode_values(
                    self._name, self._data, self._count, self._key, self._group
                )
                self._group += 1
            piece = self._rest[: count - at]
            taken[at : at + piece.size] = piece
            self._rest = self._rest[piece.size :]
            at += piece.size
        return taken


def decode_payload(name: str, payload: bytes, count: int, key: bytes) -> FloatVector:
    """Decode all values of a payload at once; see `PayloadReader`."""
    return PayloadReader(name, payload, count, key).take(count)
