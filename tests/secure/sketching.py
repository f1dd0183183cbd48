"""Small models for the tests of sums of Gram matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
from parties import Consortium, consortium

from dare_agg.codec.mask import Mask, parse_drop_rate
from dare_agg.merge.directions import directions_of
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.linears import model_linears
from dare_agg.secure import LocalSum, secure_sum
from dare_agg.secure.sketch import sketch_of, sketch_words
from dare_agg.vectors.layout import FloatVector, Layout, layout_of
from dare_agg.vectors.sources import array_source

# A Linear of fewer inputs than columns, a wide one, one that lies (in, out), and what is averaged.
LAYOUT = layout_of(
    {
        "embeddings.weight": (30, 8),
        "small.weight": (12, 8),
        "small.bias": (12,),
        "wide.weight": (20, 96),
        "wide.bias": (20,),
        "lying.weight": (120, 16),
        "lying.bias": (16,),
    }
)


def deltas_of(count: int, layout: Layout = LAYOUT, seed: int = 0) -> list[FloatVector]:
    """Deltas of low rank and some noise, as tuning leaves them."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tensors = {}
        for entry in layout.entries:
            array = 0.02 * rng.normal(0, 1, entry.shape)
            if len(entry.shape) == 2:
                for size in (1.0, 0.5, 0.2):
                    array += size * np.outer(*(rng.normal(0, 1, n) for n in entry.shape))
            tensors[entry.name] = (0.01 * array).astype(np.float32)
        found.append(layout.flatten(tensors))
    return found


def gathering(n: int = 4, layout: Layout = LAYOUT, rate: str = "0", **settings: Any) -> Consortium:
    """A consortium that merges by Gram matrices of two directions a party."""
    words: dict[str, Any] = {"directions": 2, "bits": 24, "clip": 0.5, **settings}
    return consortium(
        n,
        aggregate="wudi",
        layout=layout.fingerprint,
        size=layout.size,
        drop_rate=parse_drop_rate(rate),
        sketch=sketch_words(layout, words["directions"], n),
        **words,
    )


def summed(
    group: Consortium, deltas: dict[int, FloatVector], layout: Layout = LAYOUT, **how: Any
) -> LocalSum:
    """A whole session."""
    plan = group.terms.sketch_plan(layout)

    def values(party: int, mask: Mask) -> FloatVector:
        return np.concatenate([mask.gather(deltas[party]), sketch_of(plan, deltas[party])])

    return secure_sum(group.terms, group.roster, group.identities, values, **how)


def plain(deltas: list[FloatVector], directions: int, layout: Layout = LAYOUT) -> FloatVector:
    """The merge that anyone makes of the deltas and their directions in the clear."""
    statistics = []
    for delta in deltas:
        found = directions_of(array_source(delta), model_linears(layout), directions)
        statistics.append({name: rows for name, rows, _ in found})
    return merge_deltas(
        layout, [array_source(delta) for delta in deltas], "wudi", statistics=statistics,
        measure=False,
    )[0]  # fmt: skip


def apart(found: FloatVector, wanted: FloatVector) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
