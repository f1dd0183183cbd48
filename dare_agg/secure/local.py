"""A whole secure sum in one process: for simulations, tests and offline merges.

The same steps and bytes as over a network; parties can be made to vanish at any stage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from dare_agg.codec.mask import Mask
from dare_agg.secure import client
from dare_agg.secure.aggregate import SecureMeasurements, Sums
from dare_agg.secure.identity import Identity
from dare_agg.secure.policy import SecurePolicy
from dare_agg.secure.result import merged_sum
from dare_agg.secure.roster import Roster
from dare_agg.secure.server import SecureServer
from dare_agg.secure.terms import SecureTerms
from dare_agg.vectors.layout import FloatVector, Layout

# Stage at which a party vanishes: before it gives this answer.
DROP_STAGES = ("adverts", "shares", "vectors", "signatures", "reveals")


@dataclass(frozen=True)
class LocalSum:
    """Result of `secure_sum`: the sums, the mask they lie on and who is in them."""

    sums: Sums
    mask: Mask
    alive: tuple[int, ...]
    terms: SecureTerms

    def merged(
        self, rule: str | None = None, scaling: float = 1.0, layout: Layout | None = None
    ) -> tuple[FloatVector, SecureMeasurements]:
        """The merged delta over the whole vector, rescaled, times ``scaling``.

        ``layout``, the delta's, is needed where Gram matrices were summed.
        """
        found = merged_sum(self.sums, self.terms, self.mask, rule, scaling, layout)
        return found.vector(), found.measured


def secure_sum(
    terms: SecureTerms,
    roster: Roster,
    identities: Mapping[int, Identity],
    survivors: Callable[[int, Mask], FloatVector],
    *,
    examples: Mapping[int, float] | None = None,
    dropped: Mapping[str, Collection[int]] | None = None,
    random: client.Random = os.urandom,
) -> LocalSum:
    """Run all five stages among ``identities`` (by roster id).

    ``survivors(party, mask)`` gives a party's unscaled survivors, ``mask.gather(delta)``,
    followed by its dense values and its sketch where the terms have such.
    ``dropped`` says who vanishes before which of `DROP_STAGES`. Raises `ProtocolError` as
    the parties and the server do.
    """
    gone: set[int] = set()
    leaving = dropped or {}
    server = SecureServer(terms, roster)
    # All parties are this process: what is more than the terms ask for helps nobody.
    policy = SecurePolicy(
        terms.base, terms.layout, min_threshold_share=0.5, min_cohort_share=0.0, colluding=0.0
    )
    states: dict[int, client.ClientState] = {}

    def present(stage: str, asked: Collection[int]) -> list[int]:
        gone.update(leaving.get(stage, ()))
        return [party for party in asked if party not in gone]

    for party in present("adverts", terms.cohort):
        states[party], answer = client.advertise(identities[party], roster, terms, policy, random)
        server.take(answer)
    requests = server.close()
    for party in present("shares", requests):
        states[party], answer = client.share(
            identities[party], roster, states[party], requests[party], random
        )
        server.take(answer)
    requests = server.close()
    for party in present("vectors", requests):
        state = client.open_shares(states[party], requests[party])
        states[party], answer = client.contribute(
            identities[party],
            state,
            survivors(party, state.mask),
            examples=(examples or {}).get(party, 1.0),
            random=random,
        )
        server.take(answer)
    requests = server.close()
    for party in present("signatures", requests):
        states[party], answer = client.sign_alive(identities[party], states[party], requests[party])
        server.take(answer)
    requests = server.close()
    for party in present("reveals", requests):
        states[party], answer = client.reveal(
            identities[party], roster, states[party], requests[party]
        )
        server.take(answer)
    sums = server.finish()
    return LocalSum(sums, server.mask, server.alive, terms)
