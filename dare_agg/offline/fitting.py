"""How a MODEL's tensors stand to BASE's: the same under other names, copies, buffers, others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dare_agg.checkpoint import Checkpoint
from dare_agg.checkpoint.families import is_buffer
from dare_agg.checkpoint.model import mapped
from dare_agg.checkpoint.names import found_names
from dare_agg.checkpoint.reader import TensorInfo
from dare_agg.checkpoint.tied import copies_in, equal, with_copies
from dare_agg.errors import LayoutError
from dare_agg.offline.differences import Difference, why_it_does_not_fit
from dare_agg.offline.same_in_memory import names_alike_in_memory
from dare_agg.vectors.forms import is_mask
from dare_agg.vectors.patterns import Pattern, matches


@dataclass(frozen=True)
class Fit:
    """``model``'s tensors under BASE's names; what it holds twice stands under each name.

    ``apart`` are tied names of BASE that MODEL holds as tensors of their own, ``lacking`` BASE's
    buffers that it does not have.
    """

    model: Checkpoint
    tensors: Mapping[str, TensorInfo]
    apart: frozenset[str]
    lacking: frozenset[str]


def fit_to(
    model: Checkpoint,
    base: Checkpoint,
    copies: Mapping[str, str],
    exclude: Sequence[Pattern],
    masks: Collection[str] = (),
) -> Fit:
    """Find BASE's tensors in MODEL; ``copies`` are BASE's tied names (`copies_in`), ``masks`` what
    MODEL may lack.

    Raises `LayoutError` saying in which way they differ, with a pattern for ``--exclude`` where
    one helps.
    """
    names = found_names(model.shapes, base.shapes)
    names |= names_alike_in_memory(model, base, names)
    own = {found: name for name, found in names.items()}
    tensors = {found: model.tensors[name] for name, found in names.items()}
    apart = frozenset(
        copy
        for copy, first in copies.items()
        if copy in own and first in own and not equal(model, own[copy], own[first])
    )
    tensors |= {name: tensors[other] for name, other in with_copies(tensors, copies).items()}
    twice = copies_in(model)
    strangers = [
        name
        for name, info in model.tensors.items()
        if info.is_float
        and name not in names
        and not is_buffer(name, info.shape)
        and not matches(name, exclude)
        and not _is_copy(name, twice, names)
        and not _is_sinusoidal(model, name)
        and not is_mask(mapped(model, name), infinite=True)  # type: ignore[arg-type]
    ]
    wanted = {
        name: info
        for name, info in base.tensors.items()
        if info.is_float and not matches(name, exclude)
    }
    lacking = frozenset(
        name
        for name, info in wanted.items()
        if name not in tensors
        and (name in masks or is_buffer(name, info.shape) or _is_sinusoidal(base, name))
    )
    difference = Difference(
        model=model,
        base=base,
        strangers=strangers,
        missing=[name for name in wanted if name not in tensors and name not in lacking],
        unlike=[n for n, i in wanted.items() if n in tensors and tensors[n].shape != i.shape],
        own=own,
    )
    if difference.strangers or difference.missing or difference.unlike:
        raise LayoutError(why_it_does_not_fit(difference))
    return Fit(model, tensors, apart, lacking)


def _is_copy(name: str, twice: Mapping[str, str], names: Mapping[str, str]) -> bool:
    """Whether a tensor that BASE lacks is tied to one that it has."""
    first = twice.get(name, name)
    return any(other in names for other in (first, *twice) if twice.get(other, other) == first)


def _is_sinusoidal(checkpoint: Checkpoint, name: str) -> bool:
    """Whether these are computed positions (Marian's, Whisper's), which some versions store."""
    info = checkpoint.tensors[name]
    if not name.endswith("embed_positions.weight") or len(info.shape) != 2 or not info.size:
        return False
    first = checkpoint.array(name)[0]
    return bool(np.isin(first, (0, 1)).all() and 0 < first.sum() < first.size)
