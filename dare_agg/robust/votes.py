"""Rules that look at each element by itself: what remains where some clients say anything."""

from __future__ import annotations

import numpy as np

from dare_agg.robust.mixture import Numbers
from dare_agg.robust.rows import Matrix


def median(rows: Matrix, f: int) -> Numbers:
    """The median of each column; the mean of the two in the middle of an even number."""
    ordered = np.sort(rows, axis=0)
    low, high = (len(rows) - 1) // 2, len(rows) // 2
    return (ordered[low] + ordered[high]) / 2


def trimmed_mean(rows: Matrix, f: int) -> Numbers:
    """The mean of each column without its f largest and f smallest."""
    kept = np.sort(rows, axis=0)[f : len(rows) - f]
    total = kept[0].copy()
    for row in kept[1:]:
        total += row
    return total / len(kept)
