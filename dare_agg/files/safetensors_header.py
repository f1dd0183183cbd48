"""The header of a safetensors file, read as strictly as the safetensors library does.

A file is the header's length (u64), the header (JSON: name → dtype, shape, place) and the
tensors' bytes, one after another without a hole. What that library refuses is refused here,
and what its readers in Python would choke on: a million tensors of nothing, sizes no array has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dare_agg.errors import FormatError
from dare_agg.files.json_text import parse_json

MAX_HEADER_BYTES = 16 << 20
# In one file; a model of more has shards.
MAX_FILE_TENSORS = 1 << 16
MAX_ELEMENTS = 1 << 48
# A tensor of 4 dimensions costs 26 (`dare_agg.files.json_text`).
_COST = 40 * MAX_FILE_TENSORS
_FIELDS = {"dtype", "shape", "data_offsets"}

# safetensors dtype -> bytes an element.
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8,
}  # fmt: skip
# Elements of less than a byte, packed.
DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6} | {k: 8 * v for k, v in DTYPE_BYTES.items()}


class Place(NamedTuple):
    """A tensor of a file: its dtype, shape and bytes, counted from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_length(first: bytes, total: int) -> int:
    """The header's length, from the first 8 of a file's ``total`` bytes. Raises `FormatError`."""
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= total - 8:
        raise FormatError(f"it is cut off or no safetensors file ({total} bytes, header {length})")
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"header of {length} bytes; at most {MAX_HEADER_BYTES} are read: save it in shards"
        )
    return length


def parse_header(text: bytes, body: int) -> tuple[dict[str, Place], dict[str, str]]:
    """Tensors by name (sorted) and metadata of a header before ``body`` bytes of tensors.

    Raises `FormatError` naming the tensor.
    """
    if text.count(b"{") > 2 * MAX_FILE_TENSORS:
        raise FormatError(f"more than {MAX_FILE_TENSORS} tensors in one file: save it in shards")
    header = parse_json(text, most=MAX_HEADER_BYTES, cost=_COST, unique=True)
    if not isinstance(header, dict):
        raise FormatError("the header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("the header's metadata are not texts by name")
    if len(header) > MAX_FILE_TENSORS:
        raise FormatError(
            f"{len(header)} tensors in one file; at most {MAX_FILE_TENSORS} are read: save it in "
            "shards"
        )
    tensors = {name: _place(name, header[name]) for name in sorted(header)}
    at = 0
    for name, place in sorted(tensors.items(), key=lambda pair: pair[1][2:]):
        if place.stop > body:
            raise FormatError(
                f"it is cut off: tensor {name!r} ends at byte {place.stop} of {body}; copy the "
                "file again"
            )
        if place.start != at:
            what = (
                "overlaps another"
                if place.start < at
                else f"leaves a hole of {place.start - at} bytes"
            )
            raise FormatError(f"tensor {name!r} {what}; save the model again")
        at = place.stop
    if at != body:
        raise FormatError(f"{body - at} bytes after the last tensor; save the model again")
    return tensors, metadata


def check_safetensors(data: bytes) -> dict[str, str]:
    """Check the header of a whole file in memory before a library reads it; its metadata."""
    length = header_length(data[:8], len(data))
    return parse_header(data[8 : 8 + length], len(data) - 8 - length)[1]


def _place(name: str, entry: Any) -> Place:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise FormatError(f"tensor {name!r} has not the fields dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FormatError(f"tensor {name!r} has unknown dtype {str(dtype)[:20]!r}")
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2:
        raise FormatError(f"tensor {name!r}: shape and offsets are not whole numbers")
    size, largest = 1, 1
    for dimension in shape:
        size *= dimension
        # An array with a dimension of 0 still has to have the others.
        largest *= max(1, dimension)
        if largest > MAX_ELEMENTS:
            raise FormatError(f"tensor {name!r} has a shape of more than {MAX_ELEMENTS} elements")
    lo, hi = offsets
    bits = size * DTYPE_BITS[dtype]
    if bits != 8 * (hi - lo):
        raise FormatError(
            f"tensor {name!r} has {hi - lo} bytes, its shape and dtype need {bits / 8:.10g}"
        )
    return Place(dtype, tuple(shape), lo, hi)


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)
