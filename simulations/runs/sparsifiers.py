"""Sparsifiers of the DARE paper (arXiv 2311.03099) as pure functions of one delta.

DARE drops at random and rescales by 1/(1−p), so its result is right in expectation;
DropOnly leaves the rescale out and magnitude dropping keeps the largest: the paper's
controls. All take and return flat float32 vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.mask import DropRate, Mask, parse_drop_rate
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.vectors.layout import FloatVector, Layout


def dare(delta: FloatVector, mask: Mask) -> FloatVector:
    """Drop And REscale: δ̂ = δ·(1−m)/(1−p)."""
    return mask.scatter(mask.gather(delta))


def drop_only(delta: FloatVector, mask: Mask) -> FloatVector:
    """δ·(1−m), without the rescale; collapses already from p ≈ 0.4."""
    return mask.scatter(mask.gather(delta), rescale=False)


def dare_given(
    delta: FloatVector, dropped: NDArray[np.bool_], drop_rate: DropRate | float | str | int
) -> FloatVector:
    """DARE with a mask that is given (True = dropped). p = 1 gives zeros, no division."""
    kept = np.where(dropped, np.float32(0), delta).astype(delta.dtype, copy=False)
    if drop_rate == 1:
        return kept
    kept /= np.float32(parse_drop_rate(drop_rate).keep)
    return kept


def magnitude(
    delta: FloatVector,
    drop_rate: DropRate | float | str | int,
    layout: Layout | None = None,
    *,
    rescale: bool = False,
) -> FloatVector:
    """Per tensor, drop every \\|x\\| up to the ⌊numel·p⌋-th smallest; ties at it all go.

    Without a ``layout`` the vector counts as one tensor; p = 1 drops all. A tensor with
    ⌊numel·p⌋ = 0 is kept whole. ``rescale`` multiplies by 1/(1−p), which the paper shows to be
    harmful.
    """
    if drop_rate in (1, "1", "1.0"):
        return np.zeros_like(delta)
    rate = parse_drop_rate(drop_rate)
    result = delta.copy()
    spans = [(e.offset, e.stop) for e in layout.entries] if layout else [(0, delta.size)]
    for lo, hi in spans:
        piece = result[lo:hi]
        count = piece.size * (rate.numerator - rate.denominator) // rate.numerator
        if not count:
            continue
        sizes = np.abs(piece)
        threshold = np.partition(sizes, count - 1)[count - 1]
        piece[sizes <= threshold] = 0
    if rescale:
        result /= np.float32(rate.keep)
    return result


@dataclass(frozen=True)
class Sparsifier:
    """One row: what it does in a line, and whether it draws a mask and rescales."""

    name: str
    formula: str
    random: bool
    rescale: bool


SPARSIFIERS: Mapping[str, Sparsifier] = {
    row.name: row
    for row in (
        Sparsifier("dare", "δ·(1−m)/(1−p), m ~ Bernoulli(p)", True, True),
        Sparsifier("drop-only", "δ·(1−m), m ~ Bernoulli(p)", True, False),
        Sparsifier("magnitude", "δ where |δ| is among the largest 1−p of its tensor", False, False),
    )
}


def find_sparsifier(name: str) -> Sparsifier:
    """Return the row of a sparsifier; an unknown name raises `ConfigError`."""
    if name not in SPARSIFIERS:
        raise ConfigError(f"sparsifier {name!r} is unknown{did_you_mean(name, SPARSIFIERS)}")
    return SPARSIFIERS[name]


def sparsify(
    name: str,
    delta: FloatVector,
    *,
    mask: Mask | None = None,
    drop_rate: DropRate | float | str | int | None = None,
    layout: Layout | None = None,
) -> FloatVector:
    """Run a sparsifier by name: random ones need ``mask``, magnitude needs ``drop_rate``."""
    row = find_sparsifier(name)
    if not row.random:
        if drop_rate is None:
            raise ConfigError(f"{name} needs a drop rate; for example 0.9")
        return magnitude(delta, drop_rate, layout)
    if mask is None:
        raise ConfigError(f"{name} draws a mask; give it one")
    functions: dict[str, Callable[[FloatVector, Mask], FloatVector]] = {
        "dare": dare,
        "drop-only": drop_only,
    }
    return functions[name](delta, mask)
