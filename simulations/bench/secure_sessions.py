"""Whole small secure sums, recorded: what everybody sent, and everybody's state before each step.

Three to five parties, every aggregate, weights by examples, a dense part, parties that fall out;
each twice, in two rounds. Party 1 is malicious: what it can make with its own key is noted.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ProtocolError
from dare_agg.secure import client
from dare_agg.secure import messages as wire
from dare_agg.secure.aggregate import Sums
from dare_agg.secure.encoding import u32
from dare_agg.secure.identity import SIGNATURE_BYTES, Identity
from dare_agg.secure.kept_state import encode_state
from dare_agg.secure.keys import agree, private_key, public_of, sealing_context, sealing_key
from dare_agg.secure.party import REQUESTS
from dare_agg.secure.policy import SecurePolicy
from dare_agg.secure.roster import Roster, make_roster
from dare_agg.secure.server import SecureServer
from dare_agg.secure.terms import SecureTerms, secure_terms
from dare_agg.secure.vault import Vault

STAGES = ("adverts", "shares", "vectors", "signatures", "reveals")
MALICIOUS = 1


@dataclass(frozen=True)
class MemoryVault(Vault):
    """A vault without a disk: sealing is not what is fuzzed here."""

    kept: dict[tuple[bytes, str], bytes] = field(default_factory=dict, repr=False)

    def put(self, session: bytes, name: str, content: bytes) -> None:
        self.kept[session, name] = content

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        yield

    def get(self, session: bytes, name: str) -> bytes:
        if (session, name) not in self.kept:
            raise ProtocolError("this party holds none", reason="state")
        return self.kept[session, name]

    def holds(self, session: bytes, name: str) -> bool:
        return (session, name) in self.kept

    def drop(self, session: bytes, name: str | None = None) -> None:
        for key in [k for k in self.kept if k[0] == session and name in (None, k[1])]:
            del self.kept[key]

    def drop_all(self) -> None:
        self.kept.clear()


@dataclass
class Recording:
    """One honest session: what everybody sent, and everybody's state before each step."""

    terms: SecureTerms
    roster: Roster
    identities: dict[int, Identity]
    servers: dict[str, list[SecureServer]] = field(default_factory=dict)
    answers: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: dict[str, dict[int, bytes]] = field(default_factory=dict)
    states: dict[str, dict[int, client.ClientState]] = field(default_factory=dict)
    kept: dict[str, dict[int, bytes]] = field(default_factory=dict)
    sums: Sums | None = None
    # List items that their party made; boxes by the receiver they are sealed for.
    made: set[bytes] = field(default_factory=set)
    boxes: dict[int, set[bytes]] = field(default_factory=dict)

    @property
    def policy(self) -> SecurePolicy:
        """What its parties insist on."""
        return SecurePolicy(
            self.terms.base, self.terms.layout, min_threshold_share=0.5, colluding=0.0
        )

    @cached_property
    def signed(self) -> set[bytes]:
        """Every message that one of its parties signed."""
        return {message for answers in self.answers.values() for message in answers.values()}

    @cached_property
    def messages(self) -> list[bytes]:
        """All that travelled, both ways."""
        ways = (*self.answers.values(), *self.requests.values())
        return sorted({message for way in ways for message in way.values()})


def record(
    terms: SecureTerms, roster: Roster, identities: dict[int, Identity], leaves: str, seed: int
) -> Recording:
    """Run a session; its last party falls out before it answers stage ``leaves`` ("" for never).

    Before the server takes a stage's answers it is kept as it is, with all but party 1's answer,
    and with all.
    """
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    run = Recording(terms, roster, identities)
    server, states, asked = SecureServer(terms, roster), {}, dict.fromkeys(terms.cohort, b"")
    for stage, step in zip(STAGES, ("advertise", *REQUESTS), strict=True):
        if stage == leaves:
            del asked[max(asked)]
        run.states[step], run.requests[step] = dict(states), asked
        run.kept[step] = {party: encode_state(state) for party, state in states.items()}
        run.answers[stage] = {}
        run.servers[stage] = [copied(server)]
        for party, request in sorted(asked.items(), reverse=True):
            one = identities[party]
            if step == "advertise":
                states[party], answer = client.advertise(
                    one, roster, terms, run.policy, rng.randbytes
                )
            elif step == "share":
                states[party], answer = client.share(
                    one, roster, states[party], request, rng.randbytes
                )
            elif step == "contribute":
                opened = client.open_shares(states[party], request)
                values = numbers.uniform(-1, 1, terms.values).astype(np.float32)
                states[party], answer = client.contribute(
                    one, opened, values, examples=party * 20, random=rng.randbytes
                )
            elif step == "sign":
                states[party], answer = client.sign_alive(one, states[party], request)
            else:
                states[party], answer = client.reveal(one, roster, states[party], request)
            if party == MALICIOUS:
                run.servers[stage].append(copied(server))
            server.take(answer)
            run.answers[stage][party] = answer
        run.servers[stage].append(copied(server))
        if stage != "reveals":
            asked = server.close()
    run.requests["advertise"] = dict.fromkeys(terms.cohort, terms.encode())
    run.sums = server.finish()
    _note_items(run)
    _note_dishonest_items(run, rng)
    return run


def copied(server: SecureServer) -> SecureServer:
    """The same server, whose state changes apart."""
    new = copy.copy(server)
    for name, value in vars(server).items():
        if isinstance(value, dict | set | np.ndarray):
            setattr(new, name, value.copy())
    return new


def _note_items(run: Recording) -> None:
    terms = run.terms
    run.made.update(run.answers["adverts"].values())
    for data in run.answers["shares"].values():
        upload = wire.decode_shares(data, terms, run.roster)
        run.made.add(u32(upload.party) + upload.nonce)
        for receiver, box in upload.sealed:
            run.boxes.setdefault(receiver, set()).add(u32(upload.party) + box)
    for party, data in run.answers["signatures"].items():
        run.made.add(u32(party) + data[-SIGNATURE_BYTES:])


def _note_dishonest_items(run: Recording, rng: random.Random) -> None:
    """What party 1 can make with its own key: keys of another's or of low order, other boxes."""
    me, session = MALICIOUS, run.terms.session
    one, state = run.identities[me], run.states["share"][me]
    own = wire.split_advert(state.own)
    other = wire.split_advert(run.answers["adverts"][me + 1])
    for sealing, masking in (
        (bytes(32), own.masking_key), (own.sealing_key, bytes(32)), (bytes(32), bytes(32)),
        (own.sealing_key, own.sealing_key), (other.sealing_key, own.masking_key),
        (own.sealing_key, other.masking_key), (u32(1) + bytes(28), own.masking_key),
        (public_of(rng.randbytes(32)), public_of(rng.randbytes(32))),
    ):  # fmt: skip
        advert = wire.encode_advert(
            one, session, me, sealing, masking, own.nonce_commitment, own.self_commitment
        )
        run.made.add(advert)
    digest, secret = run.states["contribute"][me].keys_digest, private_key(state.sealing_secret)
    for receiver in run.answers["shares"]:
        theirs = wire.split_advert(run.answers["adverts"][receiver]).sealing_key
        key = sealing_key(agree(secret, theirs, receiver), digest, me, receiver)
        for content in (b"\xff" * 64, bytes(64), bytes(32) + b"\xff" * 32, rng.randbytes(64)):
            context = sealing_context(session, me, receiver)
            box = ChaCha20Poly1305(key).encrypt(bytes(12), content, context)
            run.boxes[receiver].add(u32(me) + box)


def recordings(seed: int) -> list[Recording]:
    """Sessions of three to five parties, two rounds each."""
    rng, found = random.Random(seed), []
    settings: tuple[tuple[int, str, dict[str, Any]], ...] = (
        (3, "", {}),
        (4, "vectors", {"weighting": "examples", "min_weight": 10.0, "max_weight": 100.0,
                        "dense": 7, "dense_patterns": ("head.*",), "exclude": ("own.*",)}),
        (5, "signatures", {"aggregate": "ties"}),
        (3, "", {"aggregate": "wudi", "bits": 16, "directions": 2, "sketch": 40}),
    )  # fmt: skip
    for parties, leaves, words in settings:
        own = [Identity(f"party {number}", rng.randbytes(32)) for number in range(parties)]
        roster = make_roster("fuzz", [(one.name, one.public) for one in own])
        identities = {roster.id_of(one.public): one for one in own}
        for number in (1, 2):
            terms = secure_terms(
                run="run", round_number=number, roster=roster.digest, cohort=sorted(identities),
                base="ab" * 32, layout="cd" * 32, size=300, drop_rate=parse_drop_rate("0.9"),
                clip=1.0, training=b"\1" * 32, **{"bits": 8, **words},
            )  # fmt: skip
            found.append(record(terms, roster, identities, leaves, rng.randrange(1 << 32)))
    return found
