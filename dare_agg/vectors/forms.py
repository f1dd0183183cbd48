"""What a tensor is, read from its name, kind and form: statistics and counters travel whole.

Noise on a running variance may push it below zero, and a counter that stays behind is wrong. A
causal mask whose zeros are no zeros any more hides nothing: it does not travel at all.
Statistics are known by their names (torch, Keras, Flax, Haiku). A list of arrays has numbers for
names: of it all vectors and single numbers travel whole, for its weights are matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from dare_agg.vectors.patterns import compile_patterns, matches

_OF_TORCH = (r"(^|\.)running_(mean|var)$",)
# Running statistics: torch and Keras, Flax's collection, Haiku's averages.
_STATISTICS = (
    r"(^|[^a-zA-Z])(running|moving)_(mean|var|variance|std)(:\d+)?$",
    r"(^|[^a-zA-Z])batch_stats([^a-zA-Z]|$)",
    r"(^|[^a-zA-Z])(mean|var)_ema([^a-zA-Z]|$)",
)
_SPREADS = ("var", "variance")
# A vector of more elements is no layer's: it may be a whole model laid flat.
_MOST_OF_VECTOR = 1 << 16

# Squares below this may be triangles by chance.
_LEAST_OF_MASK = 4
# Integers that travel without being named: counters, and not masks or tables of places.
_MOST_OF_COUNTER = 64
# Below this every integer is exact in float32.
INTEGERS_BELOW = 1 << 24
# An integer n stands among floating-point numbers as n/4096: of their size, so that formats with
# one scale for a block hold both.
INTEGERS_IN = 4096


def running_statistics(names: Iterable[str]) -> set[str]:
    """Return torch's running statistics by their names."""
    patterns = compile_patterns(_OF_TORCH)
    return {name for name in names if matches(name, patterns)}


def whole_tensors(arrays: Mapping[str, NDArray[np.generic]]) -> set[str]:
    """Return the names of floating-point tensors that are statistics, or may be.

    >>> sorted(whole_tensors({"bn/mean": np.zeros(2), "bn/var": np.ones(2), "w": np.ones((2, 2))}))
    ['bn/mean', 'bn/var']
    >>> sorted(whole_tensors({"0": np.ones((2, 2)), "1": np.ones(2)}))
    ['1']
    """
    floats = {name: array for name, array in arrays.items() if array.dtype.kind == "f"}
    small = [n for n, array in floats.items() if array.ndim <= 1 and array.size <= _MOST_OF_VECTOR]
    if len({re.sub(r"\d+", "0", name) for name in arrays}) == 1 < len(arrays):
        return set(small)
    patterns = compile_patterns(_STATISTICS)
    found = {name for name in floats if matches(name, patterns)}
    by_words = {_words(name): name for name in small}
    for (*module, last), name in by_words.items():
        if last in _SPREADS:
            mean = by_words.get((*module, "mean"))
            if mean is not None and arrays[mean].shape == arrays[name].shape:
                found |= {mean, name}
    return found


def is_mask(array: NDArray[np.generic], *, infinite: bool = False) -> bool:
    """Whether floating-point numbers are a mask, which nothing trains: zeros and one other number.

    In one triangle of a square, as causal attention has it, or (with ``infinite``: only) minus
    infinity, as it is added to scores, in any places. Most tensors are told by two rows.

    >>> is_mask(np.tril(np.ones((1, 1, 8, 8)))), is_mask(np.eye(8)), is_mask(np.ones((8, 8)))
    (True, False, False)
    """
    if array.dtype.kind != "f" or array.ndim < 2 or not array.size:
        return False
    rows, columns = array.shape[-2:]
    if isinstance(array, np.ndarray):
        ends = (array[(0,) * (array.ndim - 1)], array[(-1,) * (array.ndim - 1)])
    else:
        # Of a mapped file, read in parts.
        array = array.reshape(-1)
        ends = (array[:columns], array[array.size - columns :])
    found = np.unique(np.concatenate(ends))
    if len(found) != 2 or 0 not in found:
        return False
    other = found[found != 0][0]
    if not np.isneginf(other):
        if infinite or not np.isfinite(other) or not _LEAST_OF_MASK <= rows == columns:
            return False
        if array.size != rows * columns:
            return False
    values = np.asarray(array[:]).reshape(-1, columns)
    if not ((values == 0) | (values == other)).all():
        return False
    held = values != 0
    lower = (np.tri(rows, k=k, dtype=bool) for k in (0, -1))
    return bool(np.isneginf(other)) or any(
        np.array_equal(held, one) or np.array_equal(held.T, one) for one in lower
    )


def is_list(names: Iterable[str]) -> bool:
    """Whether tensors have the names that an ArrayRecord of a list gives: "0", "1", …"""
    found = set(names)
    return found == {str(number) for number in range(len(found))}


def is_counter(array: NDArray[np.generic], named: bool = False) -> bool:
    """Whether an integer tensor travels: a small one, or one that is ``named`` to, below 2²⁴."""
    if array.dtype.kind not in "iu" or not (named or array.size <= _MOST_OF_COUNTER):
        return False
    return not array.size or -INTEGERS_BELOW < int(array.min()) <= int(array.max()) < INTEGERS_BELOW


def integer_bounds(dtype: np.dtype) -> tuple[int, int]:
    """The least and the largest integer of this kind that travels."""
    most = INTEGERS_BELOW - 1
    return max(int(np.iinfo(dtype).min), -most), min(int(np.iinfo(dtype).max), most)


def _words(name: str) -> tuple[str, ...]:
    """The words of a name; ``value`` at its end (Flax's nnx) says nothing."""
    words = tuple(word for word in re.split(r"\W+", name) if word)
    return (words[:-1] if words[-1:] == ("value",) else words) or ("",)
