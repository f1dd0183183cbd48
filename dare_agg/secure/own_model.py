"""A party's own checkpoint in a one-shot merge: its delta, and the merged model with its head.

The base is public and decides the layout. What a tuned checkpoint has beyond it (the head of
its task) stays where it is; other names of the same tensors are seen through. Tensors that the
base ties are one: in the layout once, in what is written under each name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dare_agg.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    carry_files,
    open_checkpoint,
    plan_like,
)
from dare_agg.checkpoint.names import found_names
from dare_agg.checkpoint.tied import copies_by_itself, equal, followers_in, with_copies
from dare_agg.errors import CheckpointError, LayoutError
from dare_agg.secure.ledger import tensor_claim
from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.patterns import compile_patterns, matches

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublicBase:
    """The base, over the layout that everyone merges.

    ``copies`` are the names that it ties, and which tensor each is a copy of.
    """

    checkpoint: Checkpoint
    layout: Layout
    copies: Mapping[str, str]

    @cached_property
    def fingerprint(self) -> str:
        """Name of the base (SHA-256, hex) over the layout that is merged."""
        return self.checkpoint.fingerprint(self.layout)

    def vector(self) -> FloatVector:
        """The base as one flat float32 vector."""
        return self.checkpoint.vector(self.layout)

    def write(self, out: Path, vector: FloatVector) -> None:
        """Write the base with ``vector`` in its place, under tied names too."""
        held = {name: name for name in self.layout.names}
        followers = {n: first for n, first in self.copies.items() if first in self.layout}
        _write_model(self.checkpoint, self.layout, vector, held | followers, out)


@dataclass(frozen=True)
class OwnModel:
    """The base that everyone merges over, and this party's tuned model.

    ``names`` says what the tuned model calls each tensor of the layout.
    """

    base: PublicBase
    tuned: Checkpoint
    names: Mapping[str, str]

    @cached_property
    def named(self) -> Checkpoint:
        """The tuned checkpoint under the layout's names."""
        tensors = {name: self.tuned.tensors[own] for name, own in self.names.items()}
        return replace(self.tuned, tensors=tensors)

    def delta(self) -> FloatVector:
        """tuned − base, float32, over the layout. Raises `NonFiniteError`."""
        self.named.check_finite(self.base.layout)
        delta = self.named.vector(self.base.layout)
        delta -= self.base.vector()
        return delta

    def claims(self, delta: FloatVector) -> tuple[bytes, ...]:
        """What a ledger calls this model: its tuned tensors, but for those ``delta`` leaves."""
        return tuple(
            tensor_claim(self.named.array(shared.name).reshape(-1))
            for shared in self.base.layout.entries
            if delta[shared.offset : shared.stop].any()
        )

    def write_merged(self, out: Path, delta: FloatVector) -> None:
        """Write this party's checkpoint with base + ``delta`` in place of its own body.

        Heads, dtypes, configuration and tokenizer are the party's own. Raises
        `CheckpointError` where ``out`` exists.
        """
        merged = self.base.vector()
        merged += delta
        held = {own: name for name, own in self.names.items()}
        followers = followers_in(self.tuned, held.keys())
        written = held | {name: held[first] for name, first in followers.items()}
        _write_model(self.tuned, self.base.layout, merged, written, out)


def open_public(base: str | Path, exclude: Iterable[str] = ()) -> PublicBase:
    """Open a base and lay out what is merged: floating-point tensors, those that are tied once.

    Raises `CheckpointError` where nothing is left.
    """
    checkpoint = open_checkpoint(base)
    copies = copies_by_itself(checkpoint)
    layout = checkpoint.layout(exclude, copies.keys())
    if not layout.entries:
        raise CheckpointError(f"{base} has no floating-point tensor left to merge")
    return PublicBase(checkpoint, layout, copies)


def open_own(base: str | Path, tuned: str | Path, exclude: Iterable[str] = ()) -> OwnModel:
    """Open base and tuned model; raises `LayoutError` or `CheckpointError` where they do not
    fit."""
    patterns = compile_patterns(exclude)
    public, mine = open_public(base, exclude), open_checkpoint(tuned)
    shapes = public.checkpoint.shapes
    wanted = {name: shapes[name] for name in (*public.layout.names, *public.copies)}
    own = {name: mine_name for mine_name, name in found_names(mine.shapes, wanted).items()}
    for copy, first in public.copies.items():
        apart = copy in own and first in own and not equal(mine, own[copy], own[first])
        if apart and first in public.layout and not matches(copy, patterns):
            raise LayoutError(
                f"{mine.path} holds {own[copy]!r} and {own[first]!r} as two tensors, the base ties "
                f"them: as one tensor they cannot be merged; all parties exclude {copy!r} by a "
                "pattern (each keeps its own), or this one ties them again"
            )
    own |= {name: own[other] for name, other in with_copies(own, public.copies).items()}
    names = {name: own[name] for name in public.layout.names if name in own}
    model = OwnModel(public, mine, names)
    model.named.check_layout(public.layout)
    return model


def _write_model(
    like: Checkpoint, layout: Layout, vector: FloatVector, written: Mapping[str, str], out: Path
) -> None:
    """Write the checkpoint ``like`` with ``vector`` in the tensors that are ``written``, each with
    the tensor of ``layout`` that it says.

    All other files of its folder, which is the party's own, go along.
    """
    plans = plan_like(like, out, written, None)
    with CheckpointWriter(out, plans, {"format": "pt"}) as writer:
        for name in like.names:
            if name in written:
                entry = layout[written[name]]
                writer.write(name, 0, vector[entry.offset : entry.stop])
            else:
                writer.write_raw(name, 0, like.raw(name))
        if like.folder is not None and not writer.single:
            carried = carry_files(like.folder, writer.folder, own=True, skip=like.weights)
            for left in carried.left:
                LOG.warning("%s of %s was left: %s", left.file, like.folder, left.why)
