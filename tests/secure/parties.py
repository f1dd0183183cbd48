"""Small consortia for the tests of secure sums."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.secure import Identity, Roster, SecureServer, SecureTerms, make_roster, secure_terms
from dare_agg.secure import client as party
from dare_agg.secure.policy import SecurePolicy

BASE, LAYOUT = "ab" * 32, "cd" * 32


@dataclass
class Consortium:
    roster: Roster
    identities: dict[int, Identity]
    terms: SecureTerms

    def policy(self, **other: Any) -> SecurePolicy:
        given = {"min_threshold_share": 0.5, "colluding": 0.0, **other}
        return SecurePolicy(self.terms.base, self.terms.layout, **given)


def seeded(seed: int) -> Callable[[int], bytes]:
    """Reproducible bytes in place of os.urandom."""
    count = 0

    def random(length: int) -> bytes:
        nonlocal count
        count += 1
        return hashlib.shake_256(f"{seed} {count}".encode()).digest(length)

    return random


def consortium(n: int = 4, **settings: Any) -> Consortium:
    random = seeded(77)
    identities = [Identity(f"party {i}", random(32)) for i in range(n)]
    roster = make_roster("test", [(i.name, i.public) for i in identities])
    options: dict[str, Any] = {
        "run": "run",
        "round_number": 1,
        "roster": roster.digest,
        "cohort": range(1, n + 1),
        "base": BASE,
        "layout": LAYOUT,
        "size": 300,
        "drop_rate": parse_drop_rate("0.9"),
        "bits": 8,
        "clip": 1.0,
    }
    terms = secure_terms(**{**options, **settings})
    return Consortium(roster, {roster.id_of(i.public): i for i in identities}, terms)


@dataclass
class Session:
    """A session driven step by step, for tests that meddle between the steps."""

    group: Consortium
    server: SecureServer
    states: dict[int, party.ClientState]
    requests: dict[int, bytes]
    values: dict[int, np.ndarray]


def session(group: Consortium, until: str, seed: int = 5) -> Session:
    """Run all parties up to and including their answer of stage ``until`` (none closed)."""
    random = seeded(seed)
    rng = np.random.default_rng(seed)
    terms = group.terms
    values = {p: rng.uniform(-1, 1, terms.survivors).astype(np.float32) for p in terms.cohort}
    run = Session(group, SecureServer(terms, group.roster), {}, {}, values)
    for stage in ("adverts", "shares", "vectors", "signatures", "reveals"):
        if stage != "adverts":
            run.requests = run.server.close()
        for p in terms.cohort:
            run.server.take(step(run, p, stage, random))
        if stage == until:
            break
    return run


def step(run: Session, p: int, stage: str, random: Callable[[int], bytes]) -> bytes:
    """One party's answer at one stage."""
    group, identity = run.group, run.group.identities[p]
    if stage == "adverts":
        run.states[p], answer = party.advertise(
            identity, group.roster, group.terms, group.policy(), random
        )
    elif stage == "shares":
        run.states[p], answer = party.share(
            identity, group.roster, run.states[p], run.requests[p], random
        )
    elif stage == "vectors":
        state = party.open_shares(run.states[p], run.requests[p])
        run.states[p], answer = party.contribute(identity, state, run.values[p], random=random)
    elif stage == "signatures":
        run.states[p], answer = party.sign_alive(identity, run.states[p], run.requests[p])
    else:
        run.states[p], answer = party.reveal(identity, group.roster, run.states[p], run.requests[p])
    return answer
