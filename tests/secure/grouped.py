"""Secure sums over groups, driven stage by stage, for tests that meddle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from parties import BASE, LAYOUT, Consortium, consortium, seeded

from dare_agg.secure import client
from dare_agg.secure.division import divided
from dare_agg.secure.groups import GroupedServer
from dare_agg.secure.policy import SecurePolicy
from dare_agg.secure.roster import Roster
from dare_agg.secure.server import SecureServer


def grouped(n: int, groups: int, **settings: Any) -> tuple[Roster, dict[int, Consortium]]:
    """A roster of n, and one consortium a group."""
    roster = consortium(n).roster
    return roster, {
        number: consortium(n, cohort=list(members), groups=groups, **settings)
        for number, members in enumerate(divided(roster, groups))
    }


def lying(honest: Any, lie: Any) -> Any:
    return lambda *given: lie(honest(*given))


def played(
    server: GroupedServer, groups: dict[int, Consortium], gone: dict[str, set[int]], lie: Any = None
) -> Any:
    """Run all stages of all groups; ``gone`` vanish before a stage, ``lie`` edits words."""
    states, out = {}, set()
    requests: dict[int, bytes] = {p: b"" for g in groups.values() for p in g.terms.cohort}
    home = {p: g for g in groups.values() for p in g.terms.cohort}
    random = seeded(3)
    for stage in ("adverts", "shares", "vectors", "signatures", "reveals"):
        if stage != "adverts":
            requests = server.close()
        out |= gone.get(stage, set())
        for p in sorted(set(requests) - out):
            group = home[p]
            identity, roster, terms = group.identities[p], group.roster, group.terms
            if stage == "adverts":
                policy = SecurePolicy(BASE, LAYOUT, groups=terms.groups, colluding=0.0)
                states[p], answer = client.advertise(identity, roster, terms, policy, random)
            elif stage == "shares":
                states[p], answer = client.share(identity, roster, states[p], requests[p], random)
            elif stage == "vectors":
                state = client.open_shares(states[p], requests[p])
                values = np.full(terms.survivors, 0.01 * p, np.float32)
                with pytest.MonkeyPatch.context() as patch:
                    if lie and p in lie:
                        patch.setattr(client, "pack_party", lying(client.pack_party, lie[p]))
                    states[p], answer = client.contribute(identity, state, values, random=random)
            elif stage == "signatures":
                states[p], answer = client.sign_alive(identity, states[p], requests[p])
            else:
                states[p], answer = client.reveal(identity, roster, states[p], requests[p])
            server.of(p).take(answer)
    return server.finish()


def servers(groups: dict[int, Consortium], least: int) -> GroupedServer:
    return GroupedServer(
        {number: SecureServer(g.terms, g.roster) for number, g in groups.items()}, least
    )
