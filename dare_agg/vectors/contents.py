"""An order and a name for models that depend on nothing but their contents."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from dare_agg.vectors.sources import DeltaSource

_BLOCKS = 32
_BLOCK = 2048
_TILE = 1 << 16


def sketch(source: DeltaSource) -> bytes:
    """SHA-256 over 32 evenly spaced blocks of 2,048 elements: a cheap name of a delta."""
    digest = hashlib.sha256(b"dare-agg sketch 1\0" + source.size.to_bytes(8, "little"))
    width = min(_BLOCK, source.size)
    starts = {(source.size - width) * i // (_BLOCKS - 1) for i in range(_BLOCKS)}
    block = np.empty(width, np.float32)
    for start in sorted(starts):
        source.read(start, start + width, block)
        # -0.0 and 0.0 are the same delta.
        block += np.float32(0)
        digest.update(block.astype("<f4", copy=False).data)
    return digest.digest()


def content_order(
    sources: Sequence[DeltaSource], names: Sequence[bytes], ranks: Sequence[tuple]
) -> list[int]:
    """Return the order by sketch (``names``), then (should sketches agree) by all elements,
    then by ``ranks``."""

    def compare(i: int, j: int) -> int:
        if names[i] != names[j]:
            return -1 if names[i] < names[j] else 1
        different = _compare(sources[i], sources[j])
        return different or (ranks[i] > ranks[j]) - (ranks[i] < ranks[j])

    return sorted(range(len(sources)), key=functools.cmp_to_key(compare))


def _compare(a: DeltaSource, b: DeltaSource) -> int:
    left, right = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for lo in range(0, a.size, _TILE):
        hi = min(a.size, lo + _TILE)
        x, y = left[: hi - lo], right[: hi - lo]
        a.read(lo, hi, x)
        b.read(lo, hi, y)
        differ = x != y
        if differ.any():
            at = int(np.argmax(differ))
            return -1 if x[at] < y[at] else 1
    return 0
