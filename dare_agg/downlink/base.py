"""The base that versions start from, as it travels and as it lies on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import FormatError, StateError
from dare_agg.files.json_text import parse_json
from dare_agg.files.safetensors_header import (
    MAX_FILE_TENSORS,
    MAX_HEADER_BYTES,
    check_safetensors,
)
from dare_agg.vectors.model import Arrays

DOWNLINK_NAME = "versions"
# The way on which versions are named by the chain of steps and lie on disk.
CHAIN_NAME = "chain"
# What an order says besides the version asked for: the base's fingerprint, and of one on disk what
# it is called, how many bytes it has where the server sends it, and the version's fingerprint where
# clients are to compare it.
BASE_VERSION = "base-version"
BASE_NAME = "base-name"
BASE_BYTES = "base-bytes"
VERIFY = "verify"
# Payloads.
BASE = "base"
STEPS = "steps"
DENSE_STEPS = "dense-steps"


def write_base(arrays: Arrays) -> bytes:
    """Write a base's arrays with their order as safetensors bytes."""
    import json

    from safetensors.numpy import save

    packed = {name: np.array(array, order="C", copy=None) for name, array in arrays.items()}
    return bytes(save(packed, metadata={"order": json.dumps(list(arrays))}))


def read_order(text: str) -> list[str]:
    """The names of a base's arrays in their order, as its metadata hold them."""
    order = parse_json(text, most=MAX_HEADER_BYTES, cost=2 * MAX_FILE_TENSORS)
    if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
        raise FormatError("the order of the arrays is no list of names")
    return order


def read_base(path: Path | str) -> dict[str, NDArray[Any]]:
    """Read a base's file (`write_base`, or any safetensors); raises `StateError`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        data = Path(path).read_bytes()
        order = check_safetensors(data).get("order")
        arrays = load(data)
        return {name: arrays[name] for name in (read_order(order) if order else arrays)}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"base {path} cannot be read ({type(error).__name__}: {error}); give a safetensors "
            "file, for example of python -m client.base"
        ) from error
