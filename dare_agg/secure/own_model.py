"""A party's own checkpoint in a one-shot merge: its delta, and the merged model with its head.

The base is public and decides the layout. What a tuned checkpoint has beyond it (the head of
its task) stays where it is; a common prefix of names, such as ``bert.``, is seen through.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dare_agg.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    carry_files,
    open_checkpoint,
    plan_like,
)
from dare_agg.checkpoint.names import common_prefix
from dare_agg.errors import CheckpointError
from dare_agg.secure.ledger import tensor_claim
from dare_agg.vectors.layout import FloatVector, Layout, layout_of

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnModel:
    """The base, over the layout that everyone merges, and this party's tuned model."""

    base: Checkpoint
    tuned: Checkpoint
    layout: Layout
    prefix: str = field(default="")

    @cached_property
    def base_fingerprint(self) -> str:
        """Name of the base (SHA-256, hex) over the layout that is merged."""
        return self.base.fingerprint(self.layout)

    @cached_property
    def tuned_layout(self) -> Layout:
        """The same vector under the tuned checkpoint's own names."""
        return layout_of({self.prefix + e.name: e.shape for e in self.layout.entries})

    def delta(self) -> FloatVector:
        """tuned − base, float32, over the layout. Raises `NonFiniteError`."""
        self.tuned.check_finite(self.tuned_layout)
        delta = self.tuned.vector(self.tuned_layout)
        delta -= self.base.vector(self.layout)
        return delta

    def claims(self, delta: FloatVector) -> tuple[bytes, ...]:
        """What a ledger calls this model: its tuned tensors, but for those ``delta`` leaves."""
        return tuple(
            tensor_claim(self.tuned.array(mine.name).reshape(-1))
            for shared, mine in zip(self.layout.entries, self.tuned_layout.entries, strict=True)
            if delta[shared.offset : shared.stop].any()
        )

    def write_merged(self, out: Path, delta: FloatVector) -> None:
        """Write this party's checkpoint with base + ``delta`` in place of its own body.

        Heads, dtypes, configuration and tokenizer are the party's own. Raises
        `CheckpointError` where ``out`` exists.
        """
        merged = self.base.vector(self.layout)
        merged += delta
        write_model(self.tuned, self.tuned_layout, merged, out)


def write_model(like: Checkpoint, layout: Layout, vector: FloatVector, out: Path) -> None:
    """Write the checkpoint ``like`` with ``vector`` in the tensors of ``layout``.

    All other files of its folder, which is the party's own, go along.
    """
    plans = plan_like(like, out, layout.names, None)
    with CheckpointWriter(out, plans, {"format": "pt"}) as writer:
        for name in like.names:
            if name in layout:
                entry = layout[name]
                writer.write(name, 0, vector[entry.offset : entry.stop])
            else:
                writer.write_raw(name, 0, like.raw(name))
        if like.folder is not None and not writer.single:
            carried = carry_files(like.folder, writer.folder, own=True, skip=like.weights)
            for left in carried.left:
                LOG.warning("%s of %s was left: %s", left.file, like.folder, left.why)


def open_own(base: str | Path, tuned: str | Path, exclude: Iterable[str] = ()) -> OwnModel:
    """Open base and tuned model; raises `LayoutError` or `CheckpointError` where they do not
    fit."""
    public, mine = open_checkpoint(base), open_checkpoint(tuned)
    layout = public.layout(exclude)
    if not layout.entries:
        raise CheckpointError(f"{base} has no floating-point tensor left to merge")
    prefix, _ = common_prefix(mine.names, layout.names)
    model = OwnModel(public, mine, layout, prefix)
    mine.check_layout(model.tuned_layout)
    return model
