"""A state file: arrays and facts under one checksum."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import FormatError, StateError
from dare_agg.files.atomic import REMEDY, replace_file
from dare_agg.files.json_text import parse_json
from dare_agg.files.safetensors_header import check_safetensors

MAGIC = b"DAREST1\n"

NamedArrays = Mapping[str, NDArray[Any]]


def write_state(
    path: Path, arrays: NamedArrays, facts: Mapping[str, Any], *, remedy: str = REMEDY
) -> None:
    """Write arrays and JSON facts as one checksummed state file, readable by its owner.

    Raises `StateError` with ``remedy`` where it cannot be written.
    """
    from safetensors.numpy import save

    packed = {name: np.array(array, order="C", copy=None) for name, array in arrays.items()}
    body = save(packed, metadata={"facts": json.dumps(facts, sort_keys=True)})
    head = MAGIC + struct.pack("<Q", len(body))
    digest = hashlib.sha256(head)
    digest.update(body)
    replace_file(path, (head, body, digest.digest()), mode=0o600, remedy=remedy)


def read_state(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read a state file; raises `StateError` for one that is missing, cut off or altered."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StateError(f"state {path} cannot be read: {error.strerror or error}") from error
    return parse_state(data, path)


def parse_state(data: bytes, path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """As `read_state`, from the file's bytes; ``path`` is for messages."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    start = len(MAGIC) + 8
    size = struct.unpack_from("<Q", data, len(MAGIC))[0] if len(data) >= start else -1
    if data[: len(MAGIC)] != MAGIC or len(data) != start + size + 32:
        raise StateError(
            f"state {path} is cut off or no state file ({len(data)} bytes); an older round's "
            "state is needed"
        )
    view = memoryview(data)
    if hashlib.sha256(view[:-32]).digest() != data[-32:]:
        raise StateError(f"state {path} is corrupt: its checksum does not fit")
    body = bytes(view[start:-32])
    try:
        facts = parse_json(check_safetensors(body)["facts"])
        if not isinstance(facts, dict):
            raise FormatError("its facts are no JSON object")
        return load(body), facts
    except (FormatError, SafetensorError, KeyError, TypeError) as error:
        raise StateError(
            f"state {path} holds no state ({type(error).__name__}: {str(error)[:200]}); an older "
            "round's state is needed"
        ) from error
