"""A checkpoint as the bytes of one safetensors file, however many it lies in; nothing is copied."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dare_agg.checkpoint.reader import WEIGHTS_NAME, Checkpoint
from dare_agg.checkpoint.writer import head_of, plan_like


class OneFile:
    """The file that `write_checkpoint` would make of a checkpoint, read in any part."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        plans = plan_like(checkpoint, checkpoint.path.with_name(WEIGHTS_NAME), (), None)
        self._head, starts, self.size = head_of(plans, {"format": "pt"})
        self._starts = sorted((start, name) for name, start in starts.items())

    def read(self, lo: int, hi: int) -> bytes:
        """The bytes ``lo`` to ``hi``, or to the end."""
        return b"".join(self._parts(lo, min(hi, self.size)))

    def _parts(self, lo: int, hi: int) -> Iterator[bytes]:
        if lo < len(self._head):
            yield self._head[lo:hi]
        for start, name in self._starts:
            info = self._checkpoint.tensors[name]
            first, last = max(lo, start), min(hi, start + info.stop - info.start)
            if first < last:
                stored = self._checkpoint.raw(name).view(np.uint8)
                yield stored[first - start : last - start].tobytes()


__all__ = ["OneFile"]
