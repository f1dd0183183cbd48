"""Tied tensors: one tensor that a file holds under several names.

Torch models share storage between, say, ``model.embed_tokens.weight`` and ``lm_head.weight``.
transformers writes one of them, other writers write each. As two tensors they would get masks of
their own and come apart. What is tied is read from the values: weights of two dimensions and more
that are equal, and not of one value throughout, are not so by chance, but in layers that were
copied or begin alike: names that differ in numbers alone are not tied. Biases begin as zeros in
most models, so of them only those that architectures tie count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint.config import config_of
from dare_agg.checkpoint.embeddings import is_output
from dare_agg.checkpoint.reader import Checkpoint
from dare_agg.vectors.layout import Layout

_SAMPLE = 64
_NUMBER = re.compile(r"\d+", re.ASCII)
_BLOCK = 1 << 20
# A head's bias is its decoder's: (cls.predictions.bias, cls.predictions.decoder.bias).
_DECODER_BIAS = re.compile(r"^(.*)\.decoder\.bias$")


def copies_in(checkpoint: Checkpoint, apart: Collection[str] = ()) -> dict[str, str]:
    """Return which tensors are copies, and of which other: {copy: the one that stands for it}.

    An input embedding stands for the head, then the shortest name for longer ones. ``apart`` are
    names that are left alone.
    """
    alike: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, info in checkpoint.tensors.items():
        if info.is_float and name not in apart and sum(size > 1 for size in info.shape) > 1:
            alike[info.dtype, info.shape, _sample(checkpoint.raw(name))].append(name)
    same: defaultdict[bytes, list[str]] = defaultdict(list)
    for names in alike.values():
        for name in names if len(names) > 1 else ():
            same[sha256(_bits(checkpoint.raw(name)).data).digest()].append(name)
    copies: dict[str, str] = {}
    for together in (group for names in same.values() for group in _groups(names)):
        first, *others = sorted(together, key=_rank)
        if others and not _constant(checkpoint.raw(first)):
            copies |= dict.fromkeys(others, first)
    for name, info in checkpoint.tensors.items():
        pair = _DECODER_BIAS.fullmatch(name)
        bias = f"{pair[1]}.bias" if pair else ""
        known = checkpoint.tensors.get(bias)
        if (
            known is not None
            and not {name, bias} & set(apart)
            and (known.dtype, known.shape) == (info.dtype, info.shape)
            and equal(checkpoint, bias, name)
        ):
            copies[name] = bias
    return dict(sorted(copies.items()))


def copies_by_itself(base: Checkpoint) -> dict[str, str]:
    """`copies_in` a base whose tuned models are not seen.

    A head that only began as the embeddings (``tie_word_embeddings`` false) is no copy.
    """
    copies = copies_in(base)
    if config_of(base).get("tie_word_embeddings") is not False:
        return copies
    heads = {name for name in copies if is_output(name) and len(base.tensors[name].shape) > 1}
    return copies_in(base, heads) if heads else copies


def followers_in(checkpoint: Checkpoint, held: Collection[str]) -> dict[str, str]:
    """Return the tied names that are not ``held``, and the held one that each is a copy of."""
    copies = copies_in(checkpoint)
    found: dict[str, str] = {}
    for copy, first in copies.items():
        together = [name for name in (first, *(c for c, f in copies.items() if f == first))
                    if name in held]  # fmt: skip
        for name in (copy, first) if together else ():
            if name not in held:
                found[name] = together[0]
    return found


def equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors of a checkpoint have the same dtype, shape and bits."""
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    left, right = _bits(checkpoint.raw(one)), _bits(checkpoint.raw(other))
    return all(
        np.array_equal(left[at : at + _BLOCK], right[at : at + _BLOCK])
        for at in range(0, left.size, _BLOCK)
    )


def with_copies(tensors: Mapping[str, object], copies: Mapping[str, str]) -> dict[str, str]:
    """Return for each name that is missing in ``tensors`` the tied one that stands in for it."""
    sets: defaultdict[str, list[str]] = defaultdict(list)
    for copy, first in copies.items():
        sets[first].append(copy)
    found: dict[str, str] = {}
    for first, others in sets.items():
        there = [name for name in (first, *others) if name in tensors]
        if there:
            found |= {name: there[0] for name in (first, *others) if name not in tensors}
    return found


def names_of(layout: Layout, followers: Mapping[str, str]) -> dict[str, list[str]]:
    """Return under which names each tensor of a layout is written: its own, then its copies'."""
    names = {name: [name] for name in layout.names}
    for copy, first in followers.items():
        names[first].append(copy)
    return names


def _groups(names: Sequence[str]) -> list[list[str]]:
    """The names of equal tensors that are one: layers alike (copied, or begun so) are not."""
    if len({_NUMBER.sub("#", name) for name in names}) == len(names):
        return [[*names]]
    by_numbers: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in names:
        by_numbers[tuple(_NUMBER.findall(name))].append(name)
    return list(by_numbers.values())


def _rank(name: str) -> tuple[object, ...]:
    return is_output(name), name.count("."), name.encode()


def _bits(stored: NDArray[np.generic]) -> NDArray[np.uint8]:
    return stored.view(np.uint8)


def _sample(stored: NDArray[np.generic]) -> bytes:
    """A few elements: what differs in them need not be compared whole."""
    return stored[np.arange(_SAMPLE, dtype=np.int64) * (stored.size - 1) // _SAMPLE].tobytes()


def _constant(stored: NDArray[np.generic]) -> bool:
    return bool((stored == stored[0]).all())
