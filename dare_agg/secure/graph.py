"""Who masks with whom: everyone with everyone up to 100 parties, a random graph beyond.

As in the malicious setting of Bell et al. 2020 (eprint 2020/704, section 4): each party draws
its neighbours itself, with randomness of its own and after all keys are fixed, so that no
server and no coalition steers who surrounds it. It deals its shares to those, and masks with
them and with all who drew it. How many it draws follows from the number of parties and from
how many may collude and stay away; each party computes that for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from dare_agg.errors import ConfigError

COMPLETE_UP_TO = 100
COLLUDING = 0.20
MOST_COLLUDING = 1 / 3

# What may go wrong in one sum: somebody's secret found by its neighbours or its vector left
# with too few masks; a sum that ends because too few neighbours stayed.
_INSECURE = 2.0**-40
_INCOMPLETE = 2.0**-30


def corrupt_of(parties: int, colluding: float) -> int:
    """The most of ``parties`` that may collude. Raises `ConfigError` for a share above 1/3."""
    if not 0 <= colluding <= MOST_COLLUDING:
        raise ConfigError(
            f"colluding = {colluding}; a share from 0 to 1/3 of the parties is needed"
        )
    return math.floor(colluding * parties + 1e-9)


def share_threshold_for(degree: int) -> int:
    """Shares that open a secret: more than half of the neighbours."""
    return degree // 2 + 1


@lru_cache(maxsize=256)
def degree_for(parties: int, colluding: float = COLLUDING) -> int:
    """Neighbours that each party draws: n − 1 up to 100 parties, else the fewest that will do.

    An even number for which `is_safe` holds with a third of the parties gone, and for which
    as many drop-outs as may collude leave everybody enough neighbours but for a chance of
    2**-30 (Bell et al. 2020, section 4.2, with exact hypergeometric tails in place of its
    bounds). Raises `ConfigError` for a share above 1/3.
    """
    corrupt = corrupt_of(parties, colluding)
    if parties <= COMPLETE_UP_TO:
        return parties - 1
    for degree in range(2, parties - 1, 2):
        threshold = share_threshold_for(degree)
        lost = degree + 1 - threshold
        if (
            is_safe(parties, degree, threshold, colluding, parties // 3)
            and parties * _tail(parties - 1, corrupt, degree, lost) <= _INCOMPLETE
        ):
            return degree
    return parties - 1


def is_safe(parties: int, degree: int, threshold: int, colluding: float, gone: int) -> bool:
    """Whether drawing ``degree`` neighbours protects each of ``parties``, but for 2**-40.

    Two things may happen: ``threshold`` of someone's neighbours collude and open its secrets;
    or a group of honest parties masks with nobody outside it that is honest and among those
    who stay (``gone`` may be missing), so that its sum shows by itself.
    """
    corrupt = corrupt_of(parties, colluding)
    if degree >= parties - 1:
        return corrupt < threshold
    opened = parties * _tail(parties - 1, corrupt, degree, threshold)
    return opened + _parted(parties, degree, corrupt, gone) <= _INSECURE


def _tail(others: int, marked: int, drawn: int, least: int) -> float:
    """Chance that of ``drawn`` among ``others``, without replacement, ``least`` are marked."""
    hit = sum(
        math.comb(marked, count) * math.comb(others - marked, drawn - count)
        for count in range(max(least, 0), min(marked, drawn) + 1)
    )
    return hit / math.comb(others, drawn)


def _parted(parties: int, degree: int, corrupt: int, gone: int) -> float:
    """Bound on the chance that some honest group that stays is cut off from the others.

    A union bound over groups of up to half of them: each of its members must have drawn within
    the group, the corrupt and the gone. That others drew them is left out, on the safe side.
    """
    staying = parties - corrupt - gone
    chance = 0.0
    for size in range(1, staying // 2 + 1):
        reach = size - 1 + corrupt + gone
        if reach < degree:
            continue
        drawn = _log_choices(reach, degree) - _log_choices(parties - 1, degree)
        logarithm = _log_choices(staying, size) + size * drawn
        if logarithm > 0:
            return 1.0
        chance += math.exp(logarithm)
    return chance


def _log_choices(count: int, chosen: int) -> float:
    return math.lgamma(count + 1) - math.lgamma(chosen + 1) - math.lgamma(count - chosen + 1)


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
