"""What an update file says of itself: its preamble and JSON header, written and read.

Nothing in it is trusted: sizes are bounded before memory is taken, and only the canonical text of
a good header passes. `dare_agg/codec/UPDATE_FORMAT.md` is the normative text.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dare_agg.codec.directions import Directions, DirectionsPlan, parse_plan
from dare_agg.codec.mask import DropRate
from dare_agg.codec.rates import TensorRates
from dare_agg.codec.update_spec import UpdateSpec
from dare_agg.errors import ConfigError, FormatError, UpdateError
from dare_agg.files.json_text import parse_json
from dare_agg.vectors.layout import (
    MAX_DIMENSIONS,
    MAX_PARAMETERS,
    MAX_TENSORS,
    Layout,
    bad_name,
    layout_of,
)

FILE_MAGIC = b"DAREFILE"
FILE_VERSION = 1
# Of files whose update has keep rates by tensor.
BY_TENSOR_FILE_VERSION = 2
# Of files with directions behind the update, whatever its keep rates.
DIRECTIONS_FILE_VERSION = 3
MAX_FILE_HEADER_BYTES = 16 << 20
DTYPES = ("BF16", "F16", "F32", "F64")
# A tensor of 4 dimensions costs 18 (`dare_agg.files.json_text`).
_HEADER_COST = 24 * MAX_TENSORS
_PREAMBLE = struct.Struct("<8sII")
PREAMBLE_BYTES = _PREAMBLE.size
_KEYS = frozenset(
    ("base", "drop-rate", "mask", "mask-key", "rank", "rescale", "seed", "tensors", "values",
     "values-key")
)  # fmt: skip
_KEYS_WITH_DIRECTIONS = _KEYS | {"by-tensor", "directions"}


@dataclass(frozen=True)
class FileHeader:
    """What an update file says of itself.

    ``base`` is the base's fingerprint (hex), ``dtypes`` the tuned model's storage types by
    tensor (safetensors words), ``seed`` the user's seed or None. With ``by_tensor`` the update
    inside has a keep rate for each tensor, and brings them. ``directions`` says which tensors'
    directions lie behind it, and ``carried`` holds them, in a header that was read.
    """

    layout: Layout
    dtypes: Mapping[str, str]
    base: str
    drop_rate: DropRate
    mask: str
    mask_key: bytes
    rank: int
    values: str
    values_key: bytes
    rescale: bool
    seed: int | None
    by_tensor: bool = False
    directions: DirectionsPlan | None = None
    carried: Directions | None = field(default=None, repr=False, compare=False)

    @property
    def version(self) -> int:
        """The file version."""
        if self.directions is not None:
            return DIRECTIONS_FILE_VERSION
        return BY_TENSOR_FILE_VERSION if self.by_tensor else FILE_VERSION

    def to_json(self) -> bytes:
        """The one canonical text: keys sorted, no white space, ASCII."""
        record: dict[str, Any] = {
            "base": self.base,
            "drop-rate": [self.drop_rate.numerator, self.drop_rate.denominator],
            "mask": self.mask,
            "mask-key": self.mask_key.hex(),
            "rank": self.rank,
            "rescale": self.rescale,
            "seed": self.seed,
            "tensors": [
                [entry.name, self.dtypes[entry.name], list(entry.shape)]
                for entry in self.layout.entries
            ],
            "values": self.values,
            "values-key": self.values_key.hex(),
        }
        if self.directions is not None:
            record |= {"by-tensor": self.by_tensor, "directions": self.directions.record()}
        return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()

    def spec(self) -> UpdateSpec:
        """What the in-round form inside the file must be."""
        return UpdateSpec(
            size=self.layout.size,
            drop_rate=self.drop_rate,
            mask=self.mask,
            mask_key=self.mask_key,
            values_key=self.values_key,
            rank=self.rank,
            values=self.values,
            base=self.base,
            layout=self.layout.fingerprint,
            rescale=self.rescale,
            context=hashlib.sha256(self.to_json()).digest(),
            rates=TensorRates(self.layout.sizes) if self.by_tensor else None,
        )


def preamble(version: int, length: int) -> bytes:
    """The first 16 bytes of a file whose JSON has so many bytes."""
    return _PREAMBLE.pack(FILE_MAGIC, version, length)


def read_preamble(found: bytes, size: int) -> tuple[int, int]:
    """Version, and length of the JSON, from the first 16 bytes of a file of ``size`` bytes.

    Raises `UpdateError` where they are none.
    """
    if not FILE_MAGIC.startswith(found[:8]) or not found:
        raise UpdateError(
            f"begins with {found[:8]!r}, not {FILE_MAGIC!r}: this is no update file",
            reason="malformed",
        )
    if len(found) < PREAMBLE_BYTES:
        raise UpdateError(
            f"{size} bytes; an update file begins with {PREAMBLE_BYTES}", reason="truncated"
        )
    _, version, length = _PREAMBLE.unpack(found)
    if not FILE_VERSION <= version <= DIRECTIONS_FILE_VERSION:
        raise UpdateError(
            f"file version {version}; this dare-agg reads {FILE_VERSION} to "
            f"{DIRECTIONS_FILE_VERSION}: install a newer one",
            reason="version",
        )
    if not 2 <= length <= MAX_FILE_HEADER_BYTES:
        raise UpdateError(
            f"header of {length} bytes; 2 to {MAX_FILE_HEADER_BYTES} are allowed",
            reason="malformed",
        )
    if PREAMBLE_BYTES + length > size:
        raise UpdateError(
            f"{size} bytes; its header alone needs {PREAMBLE_BYTES + length}", reason="truncated"
        )
    return version, length


def parse_header(text: bytes, version: int = FILE_VERSION) -> FileHeader:
    """Read the JSON header; only the canonical text of a good header passes.

    Raises `UpdateError` for any other.
    """
    try:
        record = parse_json(text, most=MAX_FILE_HEADER_BYTES, cost=_HEADER_COST, any_text=True)
    except FormatError as error:
        raise UpdateError(
            f"the header is no JSON: {str(error)[:80]}", reason="malformed"
        ) from error
    directed = version == DIRECTIONS_FILE_VERSION
    keys = _KEYS_WITH_DIRECTIONS if directed else _KEYS
    if not isinstance(record, dict) or record.keys() != keys:
        raise UpdateError(
            f"the header's keys are not {', '.join(sorted(keys))}", reason="malformed"
        )
    if not isinstance(record.get("by-tensor", False), bool):
        raise UpdateError("by-tensor is neither true nor false", reason="malformed")
    layout, dtypes = _parse_tensors(record["tensors"])
    stride = _whole_numbers(record["drop-rate"], "drop-rate", 2)
    seed = record["seed"]
    if seed is not None:
        (seed,) = _whole_numbers([seed], "seed", 1)
    if not isinstance(record["rescale"], bool):
        raise UpdateError("rescale is neither true nor false", reason="malformed")
    try:
        drop_rate = DropRate(*stride)
    except ConfigError as error:
        raise UpdateError(str(error), reason="mask") from error
    header = FileHeader(
        layout=layout,
        dtypes=dtypes,
        base=_hex(record, "base", 32).hex(),
        drop_rate=drop_rate,
        mask=_word(record, "mask"),
        mask_key=_hex(record, "mask-key", 16),
        rank=_whole_numbers([record["rank"]], "rank", 1)[0],
        values=_word(record, "values"),
        values_key=_hex(record, "values-key", 16),
        rescale=record["rescale"],
        seed=seed,
        by_tensor=record["by-tensor"] if directed else version == BY_TENSOR_FILE_VERSION,
        directions=parse_plan(record["directions"], layout) if directed else None,
    )
    if header.to_json() != text:
        raise UpdateError("the header is not in its canonical form", reason="malformed")
    return header


def _parse_tensors(rows: Any) -> tuple[Layout, dict[str, str]]:
    if not isinstance(rows, list) or len(rows) > MAX_TENSORS:
        raise UpdateError(f"tensors is no list of at most {MAX_TENSORS}", reason="layout")
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    total, before = 0, b""
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str):
            raise UpdateError(
                f"tensor number {len(shapes)} is not [name, dtype, shape]", reason="layout"
            )
        name, dtype, shape = row
        if problem := bad_name(name):
            raise UpdateError(f"tensor name {name[:80]!r} {problem}", reason="layout")
        if name in shapes or (shapes and name.encode() < before):
            raise UpdateError(
                f"tensor {name[:80]!r} is there twice or out of order", reason="layout"
            )
        if dtype not in DTYPES:
            raise UpdateError(
                f"tensor {name[:80]!r} has dtype {str(dtype)[:16]!r}; known: {', '.join(DTYPES)}",
                reason="layout",
            )
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
            raise UpdateError(
                f"tensor {name[:80]!r} has no shape of at most {MAX_DIMENSIONS} dimensions",
                reason="layout",
            )
        size = 1
        for dimension in _whole_numbers(shape, "shape", len(shape), reason="layout"):
            # Before the next product: it stays small whatever the numbers.
            size = min(size * min(dimension, MAX_PARAMETERS + 1), MAX_PARAMETERS + 1)
        total += size
        if total > MAX_PARAMETERS:
            raise UpdateError(
                f"more than {MAX_PARAMETERS} parameters by tensor {name[:80]!r}", reason="layout"
            )
        before = name.encode()
        shapes[name], dtypes[name] = tuple(shape), dtype
    return layout_of(shapes), dtypes


def _whole_numbers(
    values: Any, what: str, count: int, reason: str = "malformed"
) -> tuple[int, ...]:
    if (
        not isinstance(values, list)
        or len(values) != count
        or any(isinstance(v, bool) or not isinstance(v, int) for v in values)
        or any(not 0 <= v < 1 << 64 for v in values)
    ):
        raise UpdateError(f"{what} is not {count} whole numbers below 2**64", reason=reason)
    return tuple(values)


def _word(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise UpdateError(f"{key} is no text", reason="malformed")
    return record[key]


def _hex(record: Mapping[str, Any], key: str, length: int) -> bytes:
    text = _word(record, key)
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != length:
        raise UpdateError(f"{key} is not {2 * length} hex digits", reason="malformed")
    return data


def checked_spec(header: FileHeader) -> UpdateSpec:
    """The header's `UpdateSpec`; raises `UpdateError` for one that no update can have."""
    try:
        spec = header.spec()
        spec.draw_mask()
    except ConfigError as error:
        raise UpdateError(str(error), reason="malformed") from error
    return spec
