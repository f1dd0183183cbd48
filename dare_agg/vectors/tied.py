"""Tied tensors: one tensor that a model holds under several names, read from the values.

Torch models share storage between, say, ``embed_tokens.weight`` and ``lm_head.weight``, and a
state_dict holds each. As two tensors they would get masks of their own and come apart. Weights of
two dimensions and more that are equal, and not of one value throughout, are not so by chance;
where they only began alike (layers that were copied), training tells: see `came_apart`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SAMPLE = 64
_BLOCK = 1 << 20


def tied_tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Return which tensors are copies, and of which other: {copy: the one that stands for it}.

    The first name in the order of bytes stands for the others.

    >>> w = np.arange(6.0).reshape(2, 3)
    >>> tied_tensors({"head": w, "embed": w.copy(), "other": w + 1, "zeros": w * 0})
    {'head': 'embed'}
    """
    alike: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in sorted(arrays, key=str.encode):
        array = arrays[name]
        if sum(size > 1 for size in array.shape) > 1:
            alike[array.dtype, array.shape, _sample(array)].append(name)
    copies: dict[str, str] = {}
    for names in alike.values():
        firsts: list[str] = []
        for name in names:
            first = next((f for f in firsts if _same_bits(arrays[f], arrays[name])), None)
            if first is not None:
                copies[name] = first
            elif len(names) > 1 and not _constant(arrays[name]):
                firsts.append(name)
    return copies


def sets_of(copies: Mapping[str, str]) -> dict[str, list[str]]:
    """The names of each tied tensor, by the one that stands for them."""
    sets: defaultdict[str, list[str]] = defaultdict(list)
    for copy, first in copies.items():
        sets[first].append(copy)
    return {first: [first, *others] for first, others in sets.items()}


def came_apart(names: Iterable[str], arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """Those names of a tied tensor under which ``arrays`` hold something else than the first."""
    there = [name for name in names if name in arrays]
    return [n for n in there if not np.array_equal(arrays[n], arrays[there[0]], equal_nan=True)]


def _sample(array: NDArray[Any]) -> bytes:
    """A few elements: what differs in them need not be compared whole."""
    places = np.arange(_SAMPLE, dtype=np.int64) * (array.size - 1) // (_SAMPLE - 1)
    return bytes(array.reshape(-1)[places].tobytes())


def _same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    pairs = zip(_blocks(one), _blocks(other), strict=True)
    return all(np.array_equal(_bits(left), _bits(right)) for left, right in pairs)


def _bits(piece: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(piece).view(np.uint8)


def _constant(array: NDArray[Any]) -> bool:
    first = array.reshape(-1)[:1]
    return all(bool((piece == first).all()) for piece in _blocks(array))


def _blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The elements in order, a block at a time: tensors may lie on disk."""
    flat = array.reshape(-1)
    return (flat[lo : lo + _BLOCK] for lo in range(0, flat.size, _BLOCK))
