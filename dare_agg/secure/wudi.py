"""**wudi**: the words of a mean, and behind the values sketches of each party's Gram matrices.

The survivors' mean is merged by what the sketches add up to (`dare_agg.secure.solved`). Small
eigenvalues of the sums count, so values have the bits of a weighed mean.
"""

from __future__ import annotations

from dataclasses import replace

from dare_agg.secure.aggregate import MAX_BITS, Rule
from dare_agg.secure.mean import MEAN, read_mean

WUDI = replace(
    MEAN,
    name="wudi",
    code=2,
    title="WUDI",
    least_bits=16,
    rules={"wudi": Rule(read_mean, "wudi")},
    weighable=False,
    usual_bits=MAX_BITS,
    sketches=True,
)
