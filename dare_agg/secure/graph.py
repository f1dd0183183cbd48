"""Who masks with whom: everyone with everyone up to 100 parties, a random graph beyond.

As in the malicious setting of Bell et al. 2020 (eprint 2020/704, section 4): each party draws
its neighbours itself, with randomness of its own and after all keys are fixed, so that no
server and no coalition steers who surrounds it. It deals its shares to those, and masks with
them and with all who drew it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dare_agg.errors import ConfigError

COMPLETE_UP_TO = 100

# Share of parties that may collude -> degree at n = 100 and at n = 1000 (security 2**-40,
# correctness 2**-30 with as many drop-outs).
DEGREES = {0.10: (42, 52), 0.20: (54, 74), 0.33: (78, 114)}


def degree_for(parties: int, colluding: float = 0.20) -> int:
    """Neighbours that each party draws: n − 1 up to 100 parties, else even and about log n.

    ``colluding`` is one of `DEGREES`. Raises `ConfigError`.
    """
    if parties <= COMPLETE_UP_TO:
        return parties - 1
    if colluding not in DEGREES:
        raise ConfigError(
            f"colluding = {colluding}; one of {', '.join(map(str, DEGREES))} is needed"
        )
    low, high = DEGREES[colluding]
    exact = low + (high - low) * math.log10(parties / 100)
    return min(parties - 1, 2 * math.ceil(exact / 2))


def draw_neighbours(
    party: int, parties: Sequence[int], degree: int, random: Callable[[int], bytes]
) -> tuple[int, ...]:
    """Draw ``degree`` others, each set alike likely, ascending; all where there are no more."""
    others = [other for other in parties if other != party]
    for at in range(degree if degree < len(others) else 0):
        swap = at + _below(len(others) - at, random)
        others[at], others[swap] = others[swap], others[at]
    return tuple(sorted(others[:degree]))


def _below(span: int, random: Callable[[int], bytes]) -> int:
    """A number below ``span``, exactly uniform."""
    bound = (1 << 64) - (1 << 64) % span
    while True:
        drawn = int.from_bytes(random(8), "little")
        if drawn < bound:
            return drawn % span
