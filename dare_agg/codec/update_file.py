"""Update files (``*.dare``): an update that describes itself.

A preamble, a canonical JSON header (what `UpdateSpec` and the layout hold), then the very
bytes of the in-round form, whose context field is the SHA-256 of the JSON: its checksum
covers the whole file. `dare_agg/codec/UPDATE_FORMAT.md` is the normative text.

Written through a memory map into a draft that is renamed when complete; read through a
memory map, so neither takes memory that grows with the model.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.directions import decode_directions, encode_directions, plan_directions
from dare_agg.codec.file_header import (
    MAX_FILE_HEADER_BYTES,
    PREAMBLE_BYTES,
    FileHeader,
    checked_spec,
    parse_header,
    preamble,
    read_preamble,
)
from dare_agg.codec.update import decode_described, encode_update_into, update_bytes
from dare_agg.codec.update_source import Update
from dare_agg.codec.update_spec import UpdateSpec
from dare_agg.errors import CheckpointError, ConfigError, UpdateError
from dare_agg.files.atomic import file_draft
from dare_agg.files.pages import Pages
from dare_agg.vectors.layout import FloatVector, Layout, bad_name
from dare_agg.vectors.sources import DeltaSource

_ALIGNMENT = 8


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
    head = preamble(header.version, len(text)) + text
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
            version, text = read_preamble(stream.read(PREAMBLE_BYTES), size)
            json_bytes = stream.read(text)
            if len(json_bytes) < text:
                raise UpdateError("the file became shorter while it was read", reason="truncated")
            header = parse_header(json_bytes, version)
            start = PREAMBLE_BYTES + text
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
        whole, spec = memoryview(mapped), checked_spec(header)
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
