"""A reader of a file: good contents, and where JSON lies in them."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The JSON of a file and what puts other JSON in its place.
Inner = tuple[bytes, Callable[[bytes], bytes]]


@dataclass(frozen=True)
class Reader:
    """``read`` reads ``path``, of which ``seeds`` are good contents.

    ``inner`` finds the JSON in a content; ``fitted`` mends lengths and checksums of bytes.
    """

    path: Path
    seeds: tuple[bytes, ...]
    read: Callable[[], object]
    inner: Callable[[random.Random, bytes], Inner] | None = None
    fitted: Callable[[bytes], bytes] | None = None
    is_text: bool = False


def whole(rng: random.Random, blob: bytes) -> Inner:
    """A file that is JSON."""
    return blob, lambda text: text


def one_line(rng: random.Random, blob: bytes) -> Inner:
    """A line of a file of JSON lines."""
    lines = blob.split(b"\n")
    at = rng.randrange(len(lines))
    return lines[at], lambda text: b"\n".join((*lines[:at], text, *lines[at + 1 :]))


def safetensors_header(rng: random.Random, blob: bytes) -> Inner:
    """The header of a safetensors file."""
    (length,) = struct.unpack_from("<Q", blob)
    body = blob[8 + length :]
    return blob[8 : 8 + length], lambda text: struct.pack("<Q", len(text)) + text + body


def metadata(rng: random.Random, blob: bytes) -> Inner:
    """The header of a safetensors file, or the JSON that lies in its metadata."""
    text, put_back = safetensors_header(rng, blob)
    if rng.random() < 0.5:
        return text, put_back
    header = json.loads(text)
    words = header["__metadata__"]
    if not isinstance(words, dict) or not words:
        raise ValueError
    name = rng.choice(sorted(words))

    def put(new: bytes) -> bytes:
        words[name] = new.decode("utf-8", "replace")
        return put_back(json.dumps(header).encode())

    return str(words[name]).encode(), put


def in_state(rng: random.Random, blob: bytes) -> Inner:
    """The JSON in a state, whose digest fits again."""
    text, put_back = metadata(rng, blob[16:-32])
    return text, lambda new: state_of(put_back(new))


def state_of(body: bytes) -> bytes:
    """A state with this body."""
    head = b"DAREST1\n" + struct.pack("<Q", len(body))
    return head + body + hashlib.sha256(head + body).digest()


def state_fitted(blob: bytes) -> bytes:
    """A damaged state, its length and digest fitting again."""
    return state_of(blob[16:-32])


def sample_arrays() -> dict[str, np.ndarray]:
    """A small model."""
    numbers = np.random.default_rng(3)
    return {
        "a.weight": numbers.normal(size=(6, 5)).astype(np.float32),
        "b.bias": numbers.normal(size=7).astype(np.float32),
        "head.weight": numbers.normal(size=(2, 3)).astype(np.float32),
    }
