"""Update files (``*.dare``): an update that describes itself.

A preamble, a canonical JSON header (what `UpdateSpec` and the layout hold), then the very
bytes of the in-round form, whose context field is the SHA-256 of the JSON: its checksum
covers the whole file. `dare_agg/codec/UPDATE_FORMAT.md` is the normative text.

Written through a memory map into a draft that is renamed when complete; read through a
memory map, so neither takes memory that grows with the model.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.directions import (
    Directions,
    DirectionsPlan,
    decode_directions,
    encode_directions,
    parse_plan,
    plan_directions,
)
from dare_agg.codec.mask import DropRate
from dare_agg.codec.rates import TensorRates
from dare_agg.codec.update import decode_described, encode_update_into, update_bytes
from dare_agg.codec.update_source import Update
from dare_agg.codec.update_spec import UpdateSpec
from dare_agg.errors import CheckpointError, ConfigError, FormatError, UpdateError
from dare_agg.files.atomic import file_draft
from dare_agg.files.json_text import parse_json
from dare_agg.files.pages import Pages
from dare_agg.vectors.layout import (
    MAX_DIMENSIONS,
    MAX_PARAMETERS,
    MAX_TENSORS,
    FloatVector,
    Layout,
    bad_name,
    layout_of,
)
from dare_agg.vectors.sources import DeltaSource

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
_ALIGNMENT = 8
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


def write_update_file(
    path: str | os.PathLike[str],
    spec: UpdateSpec,
    layout: Layout,
    source: FloatVector | tuple[FloatVector, FloatVector] | DeltaSource,
    *,
    seed: int | None = None,
    dtypes: Mapping[str, str] | None = None,
    overwrite: bool = False,
    directions: Mapping[str, tuple[NDArray[np.floating], int]] | None = None,
    directions_values: str = "b2",
) -> FileHeader:
    """Encode ``source`` (see `encode_update`) into a file, complete or not there at all.

    ``spec.context`` is replaced by the header's digest; keep rates by tensor travel in the
    file. ``dtypes`` (default F32) are noted for the reader. ``directions`` (see `plan_directions`)
    lie behind the update, in the value format ``directions_values``. Raises `CheckpointError` where
    ``path`` exists and ``overwrite`` is not set or the disk refuses it, `ConfigError` for a spec
    of another layout, `NonFiniteError` as `encode_update`.
    """
    out = Path(path)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists; choose another name or allow overwriting (--force)")
    if spec.layout != layout.fingerprint or spec.size != layout.size:
        raise ConfigError(
            f"the update's layout is {spec.layout[:16]} ({spec.size} parameters), the tensors "
            f"have {layout.fingerprint[:16]} ({layout.size})"
        )
    for entry in layout.entries:
        if problem := bad_name(entry.name):
            raise ConfigError(f"tensor name {entry.name[:80]!r} {problem}; rename or exclude it")
    known = dtypes or {}
    header = FileHeader(
        layout=layout,
        dtypes={entry.name: known.get(entry.name, "F32") for entry in layout.entries},
        base=spec.base,
        drop_rate=spec.drop_rate,
        mask=spec.mask,
        mask_key=spec.mask_key,
        rank=spec.rank,
        values=spec.values,
        values_key=spec.values_key,
        rescale=spec.rescale,
        seed=seed,
        by_tensor=spec.rates is not None,
        directions=plan_directions(layout, directions, directions_values) if directions else None,
    )
    text = header.to_json()
    if len(text) > MAX_FILE_HEADER_BYTES:
        raise ConfigError(
            f"{len(layout.entries)} tensors need a header of {len(text)} bytes; at most "
            f"{MAX_FILE_HEADER_BYTES} are allowed"
        )
    head = _PREAMBLE.pack(FILE_MAGIC, header.version, len(text)) + text
    head += b" " * (-len(head) % _ALIGNMENT)
    rates = spec.rates and replace(spec.rates, told=False)
    context = hashlib.sha256(text).digest()
    full = replace(spec, context=context, rates=rates)
    section = b""
    if header.directions is not None and directions is not None:
        key = spec.values_key
        section = encode_directions(layout, header.directions, directions, key, context)
    with file_draft(out, kind=CheckpointError) as stream:
        total = len(head) + update_bytes(full) + len(section)
        _reserve(stream.fileno(), total)
        # Never closed by hand: after an error its traceback still refers to the map.
        mapped = mmap.mmap(stream.fileno(), total)
        mapped[: len(head)] = head
        mapped[total - len(section) :] = section
        room = memoryview(mapped)[len(head) : total - len(section)]
        encode_update_into(full, source, room, pages=Pages(mapped))
        mapped.flush()
    return header


def _reserve(file: int, size: int) -> None:
    """Give the file its full size on the disk: a full disk is an error here, not a fault later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    block = bytes(1 << 20)
    for at in range(0, size, len(block)):
        os.write(file, block[: size - at])


def read_update_file(path: str | os.PathLike[str]) -> tuple[Update, FileHeader]:
    """Open an update file, checked but for what only its base can tell.

    Raises `UpdateError` with the reason; nothing in the file is trusted, and
    nothing is allocated beyond its header of at most 16 MiB. The payload stays on the disk,
    mapped. Compare ``header.base`` with the base's fingerprint before applying it.
    """
    where = Path(path)
    try:
        with where.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            version, text = _header_text(stream.read(_PREAMBLE.size), size)
            json_bytes = stream.read(text)
            if len(json_bytes) < text:
                raise UpdateError("the file became shorter while it was read", reason="truncated")
            header = _parse(json_bytes, version)
            start = _PREAMBLE.size + text
            padding = stream.read(-start % _ALIGNMENT)
            if padding.strip(b" "):
                raise UpdateError("the bytes after the header are not blanks", reason="malformed")
            start += -start % _ALIGNMENT
            behind = header.directions.nbytes(header.layout) if header.directions else 0
            if start + behind >= size:
                raise UpdateError(
                    f"{size} bytes, all of them header or directions; the update is missing",
                    reason="truncated",
                )
            try:
                mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise UpdateError(
                    "the file became shorter while it was read", reason="truncated"
                ) from error
        whole, spec = memoryview(mapped), _checked_spec(header)
        update = decode_described(whole[start : size - behind], spec, Pages(mapped))
        if header.directions is not None:
            carried = decode_directions(
                header.directions, header.layout, whole[size - behind :], spec.values_key,
                spec.context,
            )  # fmt: skip
            header = replace(header, carried=carried)
        return update, header
    except UpdateError as error:
        raise type(error)(f"{where}: {error}", reason=error.reason) from error


def _header_text(preamble: bytes, size: int) -> tuple[int, int]:
    """Version, and length of the JSON, from the first 16 bytes of a file of ``size`` bytes."""
    if not FILE_MAGIC.startswith(preamble[:8]) or not preamble:
        raise UpdateError(
            f"begins with {preamble[:8]!r}, not {FILE_MAGIC!r}: this is no update file",
            reason="malformed",
        )
    if len(preamble) < _PREAMBLE.size:
        raise UpdateError(
            f"{size} bytes; an update file begins with {_PREAMBLE.size}", reason="truncated"
        )
    _, version, length = _PREAMBLE.unpack(preamble)
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
    if _PREAMBLE.size + length > size:
        raise UpdateError(
            f"{size} bytes; its header alone needs {_PREAMBLE.size + length}", reason="truncated"
        )
    return version, length


def _parse(text: bytes, version: int = FILE_VERSION) -> FileHeader:
    """Read the JSON header; only the canonical text of a good header passes."""
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


def _checked_spec(header: FileHeader) -> UpdateSpec:
    try:
        spec = header.spec()
        spec.draw_mask()
    except ConfigError as error:
        raise UpdateError(str(error), reason="malformed") from error
    return spec
