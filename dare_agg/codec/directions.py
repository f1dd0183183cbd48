"""Directions: what each Linear's delta is made of, in few bits, beside an update's survivors.

The leading right singular directions σⱼ·vⱼ of a delta of shape (out, in) stand for its Gram matrix
δᵀδ, by which merges without data go (`dare_agg.merge.wudi`). A direction travels as one number
σⱼ/√in in bfloat16 and the in elements of vⱼ·√in, all of them of one size, in a value format of the
codec. The normative text is section 12 of `dare_agg/codec/UPDATE_FORMAT.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.poly1305 import Poly1305
from numpy.typing import NDArray

from dare_agg.codec.derive import derive_key
from dare_agg.codec.formats import VALUE_FORMATS, find_values
from dare_agg.codec.payload import (
    PayloadReader,
    check_payload,
    encode_payload,
    payload_bytes,
)
from dare_agg.codec.value_format import MAX_UPDATE
from dare_agg.errors import ConfigError, NonFiniteError, UpdateError
from dare_agg.vectors.layout import Entry, FloatVector, Layout

CHECKSUM_BYTES = 16
MAX_RANK = 4096
# Bits of an element, and the value format that has so many.
GRAM_BITS = {1: "b1", 2: "b2", 4: "b4", 8: "i8", 16: "bf16", 32: "f32"}
_SIGMAS = "bf16"


@dataclass(frozen=True)
class Directed:
    """One tensor's directions: its number in the layout, how many, and the axis of its inputs."""

    index: int
    rank: int
    axis: int


@dataclass(frozen=True)
class DirectionsPlan:
    """Which tensors have how many directions, in which value format: all that sizes follow from."""

    tensors: tuple[Directed, ...]
    values: str

    def __post_init__(self) -> None:
        find_values(self.values)

    def record(self) -> dict[str, Any]:
        """As it stands in a file's JSON."""
        rows = [[tensor.index, tensor.rank, tensor.axis] for tensor in self.tensors]
        return {"tensors": rows, "values": self.values}

    def check(self, layout: Layout) -> None:
        """Refuse what does not fit a layout; raises `UpdateError`."""
        before = -1
        for tensor in self.tensors:
            if not before < tensor.index < len(layout.entries):
                raise UpdateError(
                    f"directions of tensor number {tensor.index} after {before}; numbers ascend "
                    f"and are below {len(layout.entries)}",
                    reason="layout",
                )
            before = tensor.index
            entry = layout.entries[tensor.index]
            if len(entry.shape) != 2 or tensor.axis not in (0, 1):
                raise UpdateError(
                    f"directions of {entry.name[:80]!r} of shape {entry.shape} along axis "
                    f"{tensor.axis}; two dimensions and axis 0 or 1 are needed",
                    reason="layout",
                )
            most = min(MAX_RANK, *entry.shape)
            if not 1 <= tensor.rank <= most:
                raise UpdateError(
                    f"{tensor.rank} directions of {entry.name[:80]!r}; 1 to {most} are allowed",
                    reason="shape",
                )

    def counts(self, layout: Layout) -> tuple[int, int]:
        """(directions, elements) of all tensors together."""
        directions = sum(tensor.rank for tensor in self.tensors)
        return directions, sum(t.rank * _width(layout.entries[t.index], t) for t in self.tensors)

    def nbytes(self, layout: Layout) -> int:
        """Bytes of the whole section, its checksum too."""
        directions, elements = self.counts(layout)
        return (
            payload_bytes(_SIGMAS, directions)
            + payload_bytes(self.values, elements)
            + CHECKSUM_BYTES
        )


@dataclass(frozen=True)
class Directions:
    """A checked section: `decoded` gives σⱼ·vⱼ, (rank, in), of each tensor by name."""

    plan: DirectionsPlan
    layout: Layout
    key: bytes
    section: NDArray[np.uint8] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the section."""
        return self.section.size

    def decoded(self) -> dict[str, FloatVector]:
        """All directions, in float32: a few numbers for each input of a Linear."""
        return dict(self._decoded())

    def _decoded(self) -> Iterator[tuple[str, FloatVector]]:
        directions, elements = self.plan.counts(self.layout)
        split = payload_bytes(_SIGMAS, directions)
        parts = self.section[:split], self.section[split:-CHECKSUM_BYTES]
        keys = _keys(self.key)
        sigmas = PayloadReader(_SIGMAS, parts[0].tobytes(), directions, keys[0])
        values = PayloadReader(self.plan.values, parts[1].tobytes(), elements, keys[0])
        for tensor in self.plan.tensors:
            entry = self.layout.entries[tensor.index]
            width = _width(entry, tensor)
            sigma = sigmas.take(tensor.rank)[:, None]
            yield entry.name, sigma * values.take(tensor.rank * width).reshape(tensor.rank, width)


def plan_directions(
    layout: Layout, found: Mapping[str, tuple[NDArray[np.floating], int]], values: str
) -> DirectionsPlan:
    """The plan of directions σⱼ·vⱼ, (rank, in), with their tensors' axes of inputs, by name.

    Raises `ConfigError` for another shape and for a direction that is 0, `NonFiniteError` for one
    that is no number.
    """
    tensors = []
    for index, entry in enumerate(layout.entries):
        if entry.name not in found:
            continue
        rows, axis = found[entry.name]
        tensor = Directed(index, len(rows), axis)
        try:
            DirectionsPlan((tensor,), values).check(layout)
        except UpdateError as error:
            raise ConfigError(str(error)) from error
        if rows.shape != (tensor.rank, _width(entry, tensor)):
            raise ConfigError(
                f"directions of {entry.name!r} have shape {rows.shape}; (rank, "
                f"{_width(entry, tensor)}) is needed"
            )
        if not np.isfinite(rows).all():
            raise NonFiniteError(f"a direction of {entry.name!r} is not finite; train it again")
        if not rows.any(axis=1).all():
            raise ConfigError(f"a direction of {entry.name!r} is 0; leave it out")
        tensors.append(tensor)
    if not tensors:
        raise ConfigError("no tensor has directions; leave them out, or name Linears that changed")
    return DirectionsPlan(tuple(tensors), values)


def encode_directions(
    layout: Layout,
    plan: DirectionsPlan,
    found: Mapping[str, tuple[NDArray[np.floating], int]],
    key: bytes,
    context: bytes,
) -> bytes:
    """The section of `plan_directions`.

    ``key`` is the update's values key, ``context`` what the checksum binds the section to.
    """
    sigmas: list[FloatVector] = []
    units: list[FloatVector] = []
    for tensor in plan.tensors:
        rows = np.asarray(found[layout.entries[tensor.index].name][0], np.float64)
        sigma = np.sqrt(np.square(rows).mean(axis=1))
        sigmas.append(sigma.astype(np.float32))
        units.append((rows / sigma[:, None]).astype(np.float32).reshape(-1))
    directions, elements = plan.counts(layout)
    value_key, _ = _keys(key)
    body = encode_payload(_SIGMAS, sigmas, directions, value_key)
    body += encode_payload(plan.values, units, elements, value_key)
    return body + _checksum(key, context, body)


def decode_directions(
    plan: DirectionsPlan, layout: Layout, section: memoryview, key: bytes, context: bytes
) -> Directions:
    """Check a section against its plan; raises `UpdateError` with the reason."""
    plan.check(layout)
    wanted = plan.nbytes(layout)
    if section.nbytes != wanted:
        raise UpdateError(
            f"directions of {section.nbytes} bytes; their plan says {wanted}: send them again",
            reason="truncated" if section.nbytes < wanted else "trailing",
        )
    data = np.frombuffer(section, np.uint8)
    body = data[:-CHECKSUM_BYTES]
    if _checksum(key, context, body.data) != data[-CHECKSUM_BYTES:].tobytes():
        raise UpdateError(
            "the directions' checksum does not fit their bytes: send them again", reason="checksum"
        )
    directions, elements = plan.counts(layout)
    split = payload_bytes(_SIGMAS, directions)
    check_payload(_SIGMAS, body[:split], directions, most=MAX_UPDATE)
    if (body[1:split:2] & 0x80).any():
        raise UpdateError("a direction's size is negative", reason="malformed")
    check_payload(plan.values, body[split:], elements, most=MAX_UPDATE)
    return Directions(plan, layout, key, data)


def parse_plan(record: Any, layout: Layout) -> DirectionsPlan:
    """Read `DirectionsPlan.record` from a file that is not trusted; raises `UpdateError`."""
    if not isinstance(record, dict) or record.keys() != {"tensors", "values"}:
        raise UpdateError("directions are not {tensors, values}", reason="malformed")
    rows, values = record["tensors"], record["values"]
    if not isinstance(values, str) or values not in VALUE_FORMATS:
        raise UpdateError(
            f"directions in value format {str(values)[:16]!r}; known: {', '.join(VALUE_FORMATS)}",
            reason="values",
        )
    if not isinstance(rows, list) or not 1 <= len(rows) <= len(layout.entries):
        raise UpdateError("directions of no tensor, or of more than there are", reason="layout")
    tensors = []
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 or not all(type(one) is int for one in row):
            raise UpdateError("directions are not [tensor, rank, axis]", reason="malformed")
        tensors.append(Directed(*row))
    plan = DirectionsPlan(tuple(tensors), values)
    plan.check(layout)
    return plan


def _width(entry: Entry, tensor: Directed) -> int:
    return entry.shape[tensor.axis]


def _keys(key: bytes) -> tuple[bytes, bytes]:
    """Keys of the values and of the checksum."""
    values = derive_key(key, "directions")
    return values, derive_key(key, "directions checksum", length=32)


def _checksum(key: bytes, context: bytes, body: bytes | memoryview) -> bytes:
    digest = Poly1305(_keys(key)[1])
    digest.update(context)
    digest.update(body)
    return digest.finalize()


def gram_values(bits: int) -> str:
    """The value format of so many bits an element; others raise `ConfigError`."""
    if bits not in GRAM_BITS:
        known: Sequence[int] = sorted(GRAM_BITS)
        raise ConfigError(
            f"gram bits = {bits}; {', '.join(map(str, known[:-1]))} or {known[-1]} are known"
        )
    return GRAM_BITS[bits]
