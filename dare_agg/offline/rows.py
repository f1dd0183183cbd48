"""Rows of embeddings and heads put in the order of one vocabulary, token by token.

What mergekit's ``tokenizer_source`` does: a token's row in OUT's vocabulary is the one that
it has in each model. Where a model lacks the token, its row is BASE's, so that the model does not
change it; where BASE lacks it, that of the model that has it, or the mean of those that do. A row
that nobody has is zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint import Checkpoint, TensorInfo, narrow, widen
from dare_agg.checkpoint.embeddings import is_output, is_token_tensor
from dare_agg.checkpoint.names import found_names
from dare_agg.checkpoint.reader import FLOAT_DTYPES
from dare_agg.checkpoint.tied import copies_in, with_copies
from dare_agg.checkpoint.writer import unwritable

_BLOCK = 1 << 20
# BASE among the members, who are numbered from 0.
BASE = -1
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Member:
    """A checkpoint, and the row that each token of OUT has in it: −1 for none."""

    checkpoint: Checkpoint
    rows: Rows

    @property
    def same(self) -> bool:
        """Whether nothing changes: OUT's tokens are this one's."""
        return np.array_equal(self.rows, np.arange(vocabulary_rows(self.checkpoint)))


def token_tensors(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Return the tensors with a row for each token: their numbers of rows and of columns."""
    found = {
        name: _matrix(name, info.shape)
        for name, info in checkpoint.tensors.items()
        if info.is_float and info.shape and is_token_tensor(name)
    }
    inputs = [rows for name, (rows, width) in found.items() if width > 1 and not is_output(name)]
    count = max(inputs, default=max((rows for rows, _ in found.values()), default=0))
    return {name: shape for name, shape in found.items() if shape[0] == count}


def vocabulary_rows(checkpoint: Checkpoint) -> int:
    """How many rows a checkpoint's embeddings have; 0 where it has none."""
    return next((rows for rows, _ in token_tensors(checkpoint).values()), 0)


def aligned(
    base: Member, models: Mapping[int, Member], place: Path
) -> tuple[Checkpoint, dict[int, Checkpoint]]:
    """Return base and models with one row for each of OUT's tokens.

    Their aligned tensors lie in files in the folder ``place``, mapped as all others are. Raises
    `CheckpointError` where they cannot be written.
    """
    members = {BASE: base, **models}
    copies = copies_in(base.checkpoint)
    own: dict[int, dict[str, str]] = {BASE: {name: name for name in base.checkpoint.tensors}}
    for number, model in models.items():
        names = found_names(model.checkpoint.shapes, base.checkpoint.shapes)
        own[number] = {found: name for name, found in names.items()}
    tokens = {number: token_tensors(member.checkpoint) for number, member in members.items()}
    changed: dict[int, dict[str, TensorInfo]] = {number: {} for number in members}
    # What stands for copies comes first, then copies that a model has come to hold apart.
    for name in sorted(tokens[BASE], key=lambda n: n in copies):
        same = [name, *(c for c, first in copies.items() if first == name)]
        parts = {}
        for number, member in members.items():
            mine = next((own[number][n] for n in same if n in own[number]), "")
            if mine in tokens[number] and mine not in changed[number]:
                parts[number] = (member, mine)
        if BASE in parts:
            filled = _missing(list(parts.values()))
            fills = dict.fromkeys(same, filled)
        dtype = base.checkpoint.tensors[name].dtype
        for number, (member, mine) in parts.items():
            # A row of BASE's that a model takes over must not be rounded.
            kept = member.checkpoint.tensors[mine].dtype
            kept = kept if kept == dtype or not len(fills[name][0]) else "F32"
            # Its name is that of the shard which it is written to.
            file = (
                place
                / f"{number}-{len(changed[number])}"
                / member.checkpoint.tensors[mine].file.name
            )
            changed[number][mine] = _written(member, mine, kept, fills[name], file)
            for copy, first in with_copies({mine: None}, copies_in(member.checkpoint)).items():
                changed[number][copy] = replace(changed[number][first], name=copy)

    def whole(number: int, member: Member) -> Checkpoint:
        tensors = {**member.checkpoint.tensors, **changed[number]}
        return replace(member.checkpoint, tensors=tensors)

    return whole(BASE, base), {number: whole(number, model) for number, model in models.items()}


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if name.endswith("final_logits_bias"):
        return int(np.prod(shape)), 1
    return shape[0], int(np.prod(shape[1:]))


Filled = tuple[Rows, NDArray[np.float32]]


def _missing(parts: Sequence[tuple[Member, str]]) -> Filled:
    """The rows for those who lack a token: which of OUT's rows, and their values (rows, width)."""
    (base, name), *models = parts
    width = _matrix(name, base.checkpoint.tensors[name].shape)[1]
    lacking = np.zeros(base.rows.size, bool)
    for member, _ in parts:
        lacking |= member.rows < 0
    places = np.flatnonzero(lacking)
    values = np.zeros((places.size, width), np.float32)
    count = np.zeros(places.size, np.float32)
    for member, mine in models:
        here = member.rows[places]
        there = np.flatnonzero(here >= 0)
        values[there] += _rows(member.checkpoint, mine, here[there], width)
        count[there] += 1
    values /= np.maximum(count, 1)[:, None]
    here = base.rows[places]
    there = np.flatnonzero(here >= 0)
    values[there] = _rows(base.checkpoint, name, here[there], width)
    # As they will stand in BASE, so that who takes one over has no delta there.
    dtype = base.checkpoint.tensors[name].dtype
    if dtype in ("F16", "BF16"):
        widen(narrow(values.reshape(-1), dtype), dtype, values.reshape(-1))
    return places, values


def _rows(checkpoint: Checkpoint, name: str, rows: Rows, width: int) -> NDArray[np.float32]:
    out = np.empty(rows.size * width, np.float32)
    stored = checkpoint.raw(name).reshape(-1, width)[rows]
    widen(stored.reshape(-1), checkpoint.tensors[name].dtype, out)
    return out.reshape(rows.size, width)


def _written(member: Member, name: str, dtype: str, filled: Filled, file: Path) -> TensorInfo:
    """Write one tensor in OUT's order, block by block."""
    info = member.checkpoint.tensors[name]
    width = _matrix(name, info.shape)[1]
    places, values = filled
    step = max(1, _BLOCK // max(1, width))
    item = np.dtype(FLOAT_DTYPES[dtype])
    try:
        file.parent.mkdir()
        with file.open("xb") as stream:
            for lo in range(0, member.rows.size, step):
                here = member.rows[lo : lo + step]
                known = np.flatnonzero(here >= 0)
                if dtype == info.dtype:
                    block = np.zeros((here.size, width), item)
                    block[known] = member.checkpoint.raw(name).reshape(-1, width)[here[known]]
                else:
                    block = np.zeros((here.size, width), np.float32)
                    block[known] = _rows(member.checkpoint, name, here[known], width)
                first, last = np.searchsorted(places, (lo, lo + here.size))
                wanted = places[first:last] - lo
                taken = here[wanted] < 0
                rows = values[first:last][taken]
                block[wanted[taken]] = narrow(rows.reshape(-1), dtype).reshape(-1, width)
                stream.write(block.tobytes())
    except OSError as error:
        raise unwritable(file.parent, error) from error
    shape = info.shape
    axis = len(shape) - 1 if name.endswith("final_logits_bias") else 0
    shape = (*shape[:axis], member.rows.size, *shape[axis + 1 :])
    return TensorInfo(name, dtype, shape, file, 0, member.rows.size * width * item.itemsize)
