"""How much each tensor changed in a round, for the keep rates of the next.

A merged change is the clients' plus the noise of their drop: with disjoint masks, or a few
survivors of many, its squares are those of the clients times the stride. So a tensor's squares are
divided by the stride that it had, which is right where nothing was dropped, too. Without that the
noise of one round would set the rates of the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.fitted_rates import TOLD_FLOOR, levels_of
from dare_agg.downlink.protocol import DrawnMask


def levels_told(
    sizes: Sequence[int], squares: NDArray[np.float64], plans: Sequence[DrawnMask]
) -> bytes:
    """The level of each tensor, of the merged change's squares and the masks it was merged of.

    Empty where nothing is known of it: clients then find their own.
    """
    if not plans or not squares.sum():
        return b""
    strides = np.zeros(len(sizes), np.float64)
    for plan in plans:
        if plan.rates is None:
            strides += 1 / plan.drop_rate.keep
            continue
        num, den = plan.rates.known.strides
        strides += np.maximum(num / den, 1)
    return levels_of(sizes, squares * len(plans) / strides, floor=TOLD_FLOOR)
