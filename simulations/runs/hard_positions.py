"""Ways of sending a delta whose positions travel too: the largest, or drawn within levels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dare_agg.vectors.layout import FloatVector, Layout
from simulations.runs.golomb import encode_positions

Pair = tuple[FloatVector, int]  # what arrives, and its bytes
# Of UltraDelta: levels of 4 bits, and how far groups' rates lie from the middle one.
_LEVEL_BITS, _STEP = 4, 0.3


def most_positions(size: int, nbytes: float, bits: float) -> int:
    """How many elements of ``bits`` each fit with their coded positions."""
    low, high = 0, size // 2
    while low < high:
        count = (low + high + 1) // 2
        share = count / size
        # The entropy of the positions, and what Golomb-Rice codes lie above it.
        entropy = -np.log2(share) + (share - 1) / share * np.log2(1 - share)
        if count * (1.04 * entropy + bits) / 8 + 40 <= nbytes:
            low = count
        else:
            high = count - 1
    return low


def largest(delta: FloatVector, layout: Layout, nbytes: int, *, exact: bool) -> Pair:
    """The elements of largest magnitude with their positions.

    As binary16, or as a sign and one size a tensor, their mean magnitude.
    """
    bits, scales = (16, 0) if exact else (1, 2 * len(layout.entries))
    count = most_positions(delta.size, nbytes - scales, bits)
    out = np.zeros_like(delta)
    if not count:
        return out, 0
    places = np.sort(np.argpartition(np.abs(delta), -count)[-count:])
    size = len(encode_positions(places, delta.size)) + -(-count * bits // 8) + scales
    if exact:
        out[places] = delta[places].astype(np.float16).astype(np.float32)
        return out, size
    for entry in layout.entries:
        own = places[np.searchsorted(places, entry.offset) : np.searchsorted(places, entry.stop)]
        if own.size:
            out[own] = np.sign(delta[own]) * np.float32(np.float16(np.abs(delta[own]).mean()))
    return out, size


def ultradelta(delta: FloatVector, layout: Layout, nbytes: int, seed: int) -> Pair:
    """UltraDelta (Wang et al. 2025, 2505.13563): rates by spread, 16 levels, drawn within each.

    Tensors in three groups of spread, a third of the parameters each, keep less, as many and more
    than the mean; each is rounded to 16 levels between its least and largest element, and the same
    share of every level survives. One factor rescales all. The paper's further factor from the
    trace norm is left to ``+fit``.
    """
    count = most_positions(delta.size, nbytes - 4 * len(layout.entries), _LEVEL_BITS)
    keep = count / delta.size
    out = np.zeros_like(delta)
    if not count:
        return out, 0
    rng = np.random.default_rng([seed, 7])
    rates = keep * _weights(delta, layout)
    places = []
    for entry, own in zip(layout.entries, rates.tolist(), strict=True):
        part = delta[entry.offset : entry.stop]
        least, most = float(part.min()), float(part.max())
        step = (most - least) / ((1 << _LEVEL_BITS) - 1)
        if not step > 0:
            continue
        levels = np.rint((part - least) / step).astype(np.int64)
        kept = _within(levels, own, rng)
        out[entry.offset + kept] = np.float32(least + step * levels[kept])
        places.append(entry.offset + kept)
    chosen = np.sort(np.concatenate(places))
    out /= np.float32(keep)
    size = len(encode_positions(chosen, delta.size)) + -(-chosen.size * _LEVEL_BITS // 8)
    return out, size + 4 * len(layout.entries)


def _weights(delta: FloatVector, layout: Layout) -> NDArray[np.float64]:
    """How much more or less than the mean each tensor keeps: thirds of the parameters by spread."""
    spread = [float(np.std(delta[entry.offset : entry.stop])) for entry in layout.entries]
    found, before = np.empty(len(spread)), 0
    for at in np.argsort(spread, kind="stable").tolist():
        size = layout.entries[at].size
        third = min(2, int(3 * (before + size / 2) / delta.size))
        found[at], before = 1 + _STEP * (third - 1), before + size
    sizes = np.array(layout.sizes, np.float64)
    return found * (sizes.sum() / (found @ sizes))


def _within(levels: NDArray[np.int64], share: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Places of a random share of each level; what is below one is drawn for."""
    order = rng.permutation(levels.size)
    order = order[np.argsort(levels[order], kind="stable")]
    counts = np.bincount(levels, minlength=1 << _LEVEL_BITS)
    kept, at = [], 0
    for count in counts.tolist():
        wanted = int(np.floor(count * share + rng.random()))
        kept.append(order[at : at + wanted])
        at += count
    return np.concatenate(kept)
