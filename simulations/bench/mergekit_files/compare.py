"""How far two models are apart, in units in the last place of their dtype."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dare_agg.checkpoint import open_checkpoint

# Bits behind the leading one, and the exponent of the least normal number.
_FORMS = {"F32": (23, -126), "F16": (10, -14), "BF16": (7, -126)}


def units(ours: Path, theirs: Path) -> tuple[float, str]:
    """The largest difference of an element, and the tensor where it is.

    A unit is that of OUT's dtype at the element, or at the root mean square of its tensor where
    the element is smaller: what is left where large numbers cancel has no more digits. Tensors
    that only one has, and other shapes, are infinitely far apart.
    """
    left, right = open_checkpoint(ours), open_checkpoint(theirs)
    # What mergekit does not write (buffers) does not count.
    if missing := set(right.names) - set(left.names):
        return np.inf, min(missing)
    worst = (0.0, "")
    for name in right.names:
        a, b = (x.array(name).astype(np.float64) for x in (left, right))
        if a.shape != b.shape:
            return np.inf, name
        if not np.isfinite(a).all() or not np.isfinite(b).all():
            return np.inf, name
        found = float(tensor_units(a, b, left.tensors[name].dtype).max(initial=0))
        worst = max(worst, (found, name))
    return worst


def tensor_units(a: np.ndarray, b: np.ndarray, dtype: str) -> np.ndarray:
    """How many units each element of a tensor is apart."""
    bits, least = _FORMS[dtype]
    typical = np.sqrt((b**2).mean()) if b.size else 0.0
    size = np.maximum(np.maximum(np.abs(a), np.abs(b)), max(typical, 2.0**least))
    return np.abs(a - b) / 2.0 ** (np.floor(np.log2(size)) - bits)
