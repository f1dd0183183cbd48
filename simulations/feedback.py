"""Error feedback: a client that keeps what it did not send, and sends it later.

    y = δ + e,   send the unscaled survivors of y,   e ← y − what the receiver decodes

(Seide et al. 2014; Karimireddy et al., arXiv 1901.09847.) Only for unscaled survivors: with
the factor 1/(1−p) the memory e grows from round to round, so that is refused. The memory is
a file on the client, bound to the layout, replaced atomically once the update is on its way.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dare_agg.codec.update import Update, UpdateSpec, decode_update, encode_update
from dare_agg.errors import ConfigError, StateError
from dare_agg.vectors.layout import FloatVector

_TILE = 1 << 16


def encode_with_feedback(
    spec: UpdateSpec, delta: FloatVector, memory: FloatVector | None
) -> tuple[bytes, FloatVector]:
    """Encode ``delta + memory``; return the update and the next memory (None counts as 0).

    Raises `ConfigError` where ``spec`` asks the receiver to rescale.
    """
    if spec.rescale:
        raise ConfigError(
            "error feedback with rescaled survivors diverges; set rescale to false, or leave "
            "feedback out"
        )
    if memory is not None and memory.shape != delta.shape:
        raise ConfigError(f"memory of {memory.size} elements, delta of {delta.size}")
    wanted = delta.copy() if memory is None else delta + memory
    blob = encode_update(spec, wanted)
    return blob, unsent(decode_update(blob, spec), wanted)


def unsent(update: Update, wanted: FloatVector) -> FloatVector:
    """``wanted`` less what a receiver of ``update`` sees, in place."""
    for lo in range(0, wanted.size, _TILE):
        hi = min(wanted.size, lo + _TILE)
        update.add(lo, hi, wanted[lo:hi], -1.0)
    return wanted


@dataclass(frozen=True)
class FeedbackFile:
    """The memory of one client and layout, in ``folder``."""

    folder: Path
    layout: str

    @property
    def path(self) -> Path:
        return self.folder / f"feedback-{self.layout[:32]}.npy"

    def read(self, size: int) -> FloatVector | None:
        """Return the memory, None if there is none; `StateError` for a damaged file."""
        if not self.path.is_file():
            return None
        try:
            memory = np.load(self.path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StateError(f"{self.path} cannot be read ({error}); remove it") from error
        if memory.shape != (size,) or memory.dtype != np.float32 or not np.isfinite(memory).all():
            raise StateError(
                f"{self.path} has {memory.dtype} of shape {memory.shape}, finite float32 of "
                f"({size},) is needed; remove it"
            )
        return memory

    def write(self, memory: FloatVector) -> None:
        """Replace the memory, complete or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        try:
            with temporary.open("wb") as stream:
                np.save(stream, memory, allow_pickle=False)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
