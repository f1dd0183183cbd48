"""Who masks with whom: everyone with everyone up to 100 parties, a k-regular graph beyond.

The graph of Bell et al. 2020 (eprint 2020/704, section 3.2): parties stand on a circle in an
order drawn from a public seed, and each is joined to its degree/2 nearest on either side.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache

from dare_agg.derive import Keystream, derive_key
from dare_agg.errors import ConfigError

COMPLETE_UP_TO = 100

# Share of parties that may collude -> degree at n = 100 and at n = 1000 (security 2**-40,
# correctness 2**-30 with as many drop-outs).
DEGREES = {0.10: (42, 52), 0.20: (54, 74), 0.33: (78, 114)}


def degree_for(parties: int, colluding: float = 0.20) -> int:
    """Neighbours of each party: n − 1 up to 100 parties, else even and about log n.

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


@lru_cache(maxsize=8)
def neighbours(ids: tuple[int, ...], degree: int, seed: bytes) -> dict[int, tuple[int, ...]]:
    """Neighbours of every id, ascending; the same for anyone with the same arguments.

    The complete graph when ``degree`` reaches the number of ids less one.
    """
    if degree >= len(ids) - 1:
        return {i: tuple(j for j in ids if j != i) for i in ids}
    if degree % 2 or degree < 2:
        raise ConfigError(f"degree = {degree}; an even number of at least 2 is needed")
    circle = _shuffled(ids, seed)
    places = range(1, degree // 2 + 1)
    count = len(circle)
    return {
        i: tuple(
            sorted(
                {circle[(at + step) % count] for step in places}
                | {circle[(at - step) % count] for step in places}
            )
        )
        for at, i in enumerate(circle)
    }


def _shuffled(ids: tuple[int, ...], seed: bytes) -> list[int]:
    """Fisher-Yates with exact uniform draws from a keystream."""
    stream = Keystream(derive_key(seed, "secure graph"))
    position = 0
    order = list(ids)
    for last in range(len(order) - 1, 0, -1):
        span = last + 1
        bound = (1 << 64) - (1 << 64) % span
        while True:
            (drawn,) = struct.unpack("<Q", stream.read(position, 8).tobytes())
            position += 8
            if drawn < bound:
                break
        swap = drawn % span
        order[last], order[swap] = order[swap], order[last]
    return order
