"""Which members of a roster are summed together, where a sum is of a group.

**The roster divides its members, once and for all** (`divided`). A division that changed from
round to round would be worth more to a curious server than any single sum: what a party adds
round after round is much alike, so sums over ever other groups are equations that single out
each party (So et al. 2021, arXiv 2106.03328). Who is with whom follows from the roster's digest: no
server draws it, and each party works it out for itself. A member that made key after key until
the digest pleased it could choose its company, so parties count every colluder of the roster as
one of their own group (`dare_agg.secure.policy.check_terms`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from dare_agg.secure.encoding import u32
from dare_agg.secure.roster import Roster


def divided(roster: Roster, groups: int) -> tuple[tuple[int, ...], ...]:
    """The members of each group, ascending: drawn by the roster's digest, sizes one apart."""

    def place(party: int) -> bytes:
        return hashlib.sha256(b"dare-agg group 1\0" + roster.digest + u32(party)).digest()

    order = sorted((member.id for member in roster.members), key=place)
    return tuple(tuple(sorted(order[group::groups])) for group in range(groups))


def own_group(roster: Roster, groups: int, party: int) -> tuple[int, ...]:
    """The members of the group that ``party`` is in. Raises `ProtocolError` for no member."""
    roster[party]
    return next(group for group in divided(roster, groups) if party in group)


def among(groups: Sequence[Sequence[int]], parties: Iterable[int]) -> dict[int, list[int]]:
    """Those of ``parties`` that are in each group, by its number; groups of none are left out."""
    here = set(parties)
    found = {number: [p for p in group if p in here] for number, group in enumerate(groups)}
    return {number: of_group for number, of_group in found.items() if of_group}
