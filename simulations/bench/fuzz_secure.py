"""Throw damaged and dishonest messages of secure sums at a party and at the server.

    python -m simulations.bench.fuzz_secure --messages 1000000 --side server

Whole small sessions are recorded: three to five parties, every aggregate, weights by examples,
a dense part, parties that fall out; each twice, in two rounds. A mutant is a message of any of
their stages with bytes damaged, cut or spliced with another session's, with list items repeated,
dropped, exchanged or in another order (under counts that fit again), or signed by party 1, which
is malicious and has only its own key. What is tried then, from the state before the message:

- the server takes it or refuses it; a refusal changes nothing; what it takes, the sender signed,
  byte for byte; and a session that goes on with it ends in an error or a sum within its bounds,
  in the honest sum where the masked vectors were honest;
- a party takes it or refuses it; after a refusal no secret of the session is left; what it takes
  is canonical and made of what parties signed or sealed for it; no step is taken twice.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg import secure
from dare_agg.codec.mask import DropRate
from dare_agg.errors import DareError, ProtocolError
from dare_agg.secure import messages as wire
from dare_agg.secure.encoding import u32
from dare_agg.secure.identity import SIGNATURE_BYTES
from dare_agg.secure.kept_state import decode_state
from dare_agg.secure.ledger import MemoryLedger
from dare_agg.secure.party import REQUESTS, Contribution, Party
from dare_agg.secure.roster import MAX_MEMBERS
from dare_agg.secure.server import SecureServer
from dare_agg.secure.shamir import SHARE_BYTES
from dare_agg.secure.terms import SecureTerms, decode_terms
from simulations.bench.fuzzing import Attempt, add_words, damaged, pieces, show
from simulations.bench.secure_sessions import (
    MALICIOUS,
    STAGES,
    MemoryVault,
    Recording,
    copied,
    recordings,
)

SIDES = ("party", "server")
_ROOM = str(Path(secure.__file__).parent)
_HEAD = 4 + 32
_SEALED = 4 + wire.SEALED_BYTES
# Of each kind: bytes before its lists, the sizes of their items, bytes behind them.
_FORMS = {
    wire.ADVERT: (wire.ADVERT_BYTES - SIGNATURE_BYTES, (), SIGNATURE_BYTES),
    wire.SHARES: (_HEAD + 36, (_SEALED,), SIGNATURE_BYTES),
    wire.VECTOR: (_HEAD + 36, (1,), SIGNATURE_BYTES),
    wire.ALIVE: (_HEAD + 36, (), SIGNATURE_BYTES),
    wire.REVEAL: (_HEAD + 36, (4 + SHARE_BYTES,), SIGNATURE_BYTES),
    wire.KEYS: (_HEAD, (wire.ADVERT_BYTES,), 0),
    wire.DELIVERY: (_HEAD, (4 + wire.NONCE_BYTES, _SEALED), 0),
    wire.ALIVE_LIST: (_HEAD, (4, 4), 0),
    wire.SIGNATURES: (_HEAD, (4, 4, 4 + SIGNATURE_BYTES), 0),
}
# A list that never ends: what it costs is watched.
_MANY, _MANY_SHARE = 1 << 15, 1e-4
_COUNTS = (0, 1, 2, 3, 4, 5, 6, 100, 101, 254, 6667, 9999, 10_000, (1 << 32) - 1)
_NUMBERS = (0.0, -1.0, 1e-320, 0.5, 1.0, 5.0, 1e6, 1e300, float("inf"), float("nan"))
_SIZES = (0, 1, 300, 1 << 28, 1 << 40, (1 << 64) - 1)
_PATTERNS = ((), ("",), ("head.*",), ("(",), ("é" * 128,), ("x",) * 65, ("(a+)+$",), ("\0",))
_ODD: dict[str, Sequence[Any]] = {
    "run": ("", "x" * 128, "x" * 129, "é", "a\nb"),
    "round": (0, 1, (1 << 32) - 1),
    "roster": (bytes(32), b"\xff" * 32),
    "cohort": ((), (1,), (1, 2), (1, 2, 3), (3, 2, 1), (1, 1, 2, 3), (0, 1, 2, 3), range(1, 102),
               range(1, MAX_MEMBERS + 1), range(1, MAX_MEMBERS + 2), (1, 2, 3, (1 << 32) - 1)),
    "threshold": _COUNTS, "degree": _COUNTS, "share_threshold": _COUNTS,
    "base": ("0" * 64, "f" * 64), "layout": ("0" * 64, "f" * 64),
    "size": _SIZES, "dense": _SIZES, "sketch": _SIZES, "directions": (0, 1, 2, 4096, 4097),
    "drop_rate": (DropRate(1, 1), DropRate(10, 1), DropRate(1 << 20, 1)),
    "bits": (0, 3, 4, 8, 24, 25, 255), "clip": _NUMBERS,
    "min_weight": _NUMBERS, "max_weight": _NUMBERS,
    "dense_patterns": _PATTERNS, "exclude": _PATTERNS,
    "training": (bytes(32), b"\1" * 32),
    "aggregate": ("mean", "ties", "wudi"), "weighting": ("equal", "examples"),
}  # fmt: skip


class Mutants:
    """What both sides share: the sessions, and ways to change one of their messages."""

    def __init__(self) -> None:
        self.runs = recordings(7)
        self.rooms = (_ROOM,)
        self.messages = [message for run in self.runs for message in run.messages]
        self.items: dict[int, list[bytes]] = {}
        for run in self.runs:
            for item in sorted(run.made.union(*run.boxes.values())):
                self.items.setdefault(len(item), []).append(item)
        self.items[4] = [u32(number) for number in (0, *range(1, 7), (1 << 32) - 1)]
        self.kept: dict[tuple[int, str], list[bytes]] = {}

    def seed(self, rng: random.Random, at: int, stage: str, good: dict[int, bytes]) -> bytes:
        """A good message of a stage, or an earlier mutant that was worth keeping."""
        own = self.kept.get((at, stage))
        if own and rng.random() < 0.3:
            return rng.choice(own)
        return rng.choice(list(good.values()))

    def keep(self, at: int, stage: str, blob: bytes) -> None:
        """Mutate this one further."""
        if len(blob) < 1 << 16:
            self.kept.setdefault((at, stage), []).append(blob)

    def damaged(self, rng: random.Random, blob: bytes) -> bytes:
        """Other bytes, or another message in its place."""
        if rng.random() < 0.1:
            return rng.choice(self.messages)
        return damaged(rng, blob, lambda: rng.choice(self.messages))

    def rebuilt(self, rng: random.Random, blob: bytes) -> bytes:
        """The message with other fields or list items, its counts fitting; unsigned."""
        form = _FORMS.get(blob[3]) if len(blob) > 3 else None
        parts = None if form is None else _parts(blob, *form)
        if parts is None:
            return self.damaged(rng, blob)
        head, lists = parts
        for _ in range(rng.choice((1, 1, 2, 3))):
            if lists and rng.random() < 0.8:
                self._change(rng, rng.choice(lists))
            else:
                at = rng.randrange(rng.choice((3, _HEAD)), len(head) + 1)
                head = head[:at] + (rng.choice(self.items[4]) + head[at + 4 :])[: len(head) - at]
        return head + b"".join(u32(len(items)) + b"".join(items) for items in lists)

    def _change(self, rng: random.Random, items: list[bytes]) -> None:
        kind = rng.randrange(6)
        if not items:
            return
        at = rng.randrange(len(items))
        if rng.random() < _MANY_SHARE:
            items += [items[at]] * _MANY
        elif kind == 0:
            items.insert(rng.randrange(len(items) + 1), items[at])
        elif kind == 1:
            del items[at]
        elif kind == 2:
            rng.shuffle(items)
        elif kind == 3:
            items[at] = rng.choice(self.items.get(len(items[at]), items))
        elif kind == 4:
            items.insert(at, rng.choice(self.items.get(len(items[at]), items)))
            if rng.random() < 0.5:
                items.sort(key=lambda item: item[:4][::-1])
        else:
            where = rng.randrange(len(items[at]))
            changed = items[at][where] ^ 1 << rng.randrange(8)
            items[at] = items[at][:where] + bytes((changed,)) + items[at][where + 1 :]


def _parts(
    blob: bytes, before: int, sizes: tuple[int, ...], behind: int
) -> tuple[bytes, list[list[bytes]]] | None:
    """Cut a message at its lists; None where its counts do not fit."""
    lists, at = [], before
    for size in sizes:
        count = int.from_bytes(blob[at : at + 4], "little")
        end = at + 4 + count * size
        if len(blob) < end:
            return None
        lists.append([blob[lo : lo + size] for lo in range(at + 4, end, size)])
        at = end
    return (blob[:before], lists) if len(blob) == at + behind else None


class ServerSide(Mutants):
    """Parties' answers, to the server."""

    name = "secure-server"

    def __init__(self) -> None:
        super().__init__()
        # Kept ones that party 1 signed: they may come again as they are.
        self.own: set[bytes] = set()

    def attempt(self, rng: random.Random) -> Attempt:
        at, stage = rng.randrange(len(self.runs)), rng.choice(STAGES)
        run = self.runs[at]
        blob = self.seed(rng, at, stage, run.answers[stage])
        own = False
        if rng.random() < 0.4:
            blob = self.damaged(rng, blob)
        else:
            body = self.rebuilt(rng, blob)
            own = rng.random() < 0.6
            if own and rng.random() < 0.7:
                body = body[:_HEAD] + u32(MALICIOUS) + body[_HEAD + 4 :]
            one = run.identities[MALICIOUS]
            blob = wire.signed(one, body) if own else body + blob[-SIGNATURE_BYTES:]
        before = rng.choice(run.servers[stage])
        lost = {party for party in run.terms.cohort if rng.random() < 0.05}
        goes_on = rng.random() < 0.2

        def work() -> None:
            server = copied(before)
            try:
                sender = server.take(blob)
            except DareError:
                assert same(server, before), "a refusal changed the server"
                raise
            honest = blob in run.signed and run.answers[stage][sender] == blob
            dishonest = sender == MALICIOUS and (own or blob in self.own)
            assert honest or dishonest, "a forgery was taken"
            if goes_on:
                self._go_on(run, server, stage, lost)

        def keep() -> None:
            self.keep(at, stage, blob)
            if own:
                self.own.add(blob)

        return Attempt(work, keep)

    @staticmethod
    def _go_on(run: Recording, server: SecureServer, stage: str, lost: set[int]) -> None:
        for later in STAGES[STAGES.index(stage) :]:
            for party, answer in run.answers[later].items():
                if party not in lost:
                    with contextlib.suppress(ProtocolError):
                        server.take(answer)
            if later != "reveals":
                server.close()
        sums = server.finish()
        assert sums.parties == len(server.alive) >= run.terms.threshold
        assert np.abs(sums.total).max() <= sums.parties * run.terms.quantiser.top
        if stage in ("signatures", "reveals"):
            assert run.sums is not None and np.array_equal(sums.total, run.sums.total)


def same(one: SecureServer, other: SecureServer) -> bool:
    """Whether two servers are in one state."""
    theirs = vars(other)
    return all(
        np.array_equal(value, theirs[name])
        if isinstance(value, np.ndarray)
        else value == theirs[name]
        for name, value in vars(one).items()
    )


class PartySide(Mutants):
    """The server's requests, to a party with its vault."""

    name = "secure-party"

    def attempt(self, rng: random.Random) -> Attempt:
        at, stage = rng.randrange(len(self.runs)), rng.choice(("advertise", *REQUESTS))
        run = self.runs[at]
        good = run.requests[stage]
        blob = self.seed(rng, at, stage, good)
        if stage == "advertise":
            mutant = odd_terms(rng, run.terms) if rng.random() < 0.5 else self.damaged(rng, blob)
        elif rng.random() < 0.4:
            mutant = self.damaged(rng, blob)
        else:
            mutant = self.rebuilt(rng, blob)
        victim = rng.choice([party for party in good if party != MALICIOUS])
        step = rng.choice(REQUESTS) if rng.random() < 0.02 else stage
        again = rng.random() < 0.25

        def work() -> None:
            party = self._party(run, stage, victim, rng)
            if stage == "advertise":
                self._begin(run, party, mutant)
            else:
                self._answer(run, party, victim, step, mutant)
                if again:
                    refused(lambda: party.answer(step, run.terms.session, mutant, _delta))

        return Attempt(work, lambda: self.keep(at, stage, mutant))

    @staticmethod
    def _party(run: Recording, stage: str, victim: int, rng: random.Random) -> Party:
        one, kept = run.identities[victim], {}
        if stage != "advertise":
            kept[run.terms.session, "state"] = run.kept[stage][victim]
        vault = MemoryVault(Path("unused"), one, kept)
        return Party(one, run.roster, vault, MemoryLedger(), random=rng.randbytes)

    @staticmethod
    def _begin(run: Recording, party: Party, mutant: bytes) -> None:
        assert isinstance(party.vault, MemoryVault)
        try:
            advert = party.advertise(mutant, run.policy)
        except DareError:
            assert not party.vault.kept, "a refusal left a state"
            raise
        terms = decode_terms(mutant)
        assert terms.encode() == mutant, "terms that are not canonical were taken"
        wire.decode_advert(advert, terms, run.roster)

    @staticmethod
    def _answer(run: Recording, party: Party, victim: int, stage: str, mutant: bytes) -> None:
        assert isinstance(party.vault, MemoryVault)
        terms = run.terms
        try:
            answer = party.answer(stage, terms.session, mutant, _delta)
        except DareError:
            assert not party.vault.kept, "a refusal left a state"
            raise
        state = decode_state(party.vault.get(terms.session, "state"))
        if stage == "share":
            adverts = wire.decode_keys(mutant, terms, run.roster)
            assert wire.encode_keys(terms.session, list(adverts)) == mutant
            assert run.made.issuperset(advert.data for advert in adverts)
            wire.decode_shares(answer, terms, run.roster)
        elif stage == "contribute":
            delivery = wire.decode_delivery(mutant, terms)
            assert wire.encode_delivery(terms.session, delivery) == mutant
            assert run.made.issuperset(u32(one) + nonce for one, nonce in delivery.nonces)
            sealed = (u32(one) + box for one, box in delivery.sealed)
            assert run.boxes[victim].issuperset(sealed), "a box of nobody's was opened"
            wire.decode_vector(answer, terms, run.roster, 1 << 20)
        elif stage == "sign":
            alive, dead = wire.decode_alive_list(mutant, terms)
            assert wire.encode_alive_list(terms.session, alive, dead) == mutant
            assert victim in alive and not {*alive} & {*dead} and len(alive) >= terms.threshold
            wire.decode_alive(answer, terms, run.roster, state.alive_digest)
        else:
            alive, dead, pairs = wire.decode_signatures(mutant, terms)
            assert wire.encode_signatures(terms.session, alive, dead, list(pairs)) == mutant
            assert len(pairs) >= terms.threshold
            assert run.made.issuperset(u32(one) + signature for one, signature in pairs)
            _, shares = wire.decode_reveal(answer, terms, run.roster, state.alive_digest)
            dealt = {one: (masking, own) for one, masking, own in run.states[stage][victim].held}
            due = {one: halves[one in alive] for one, halves in dealt.items()}
            assert dict(shares) == due, "another share than that of the signed set was revealed"


def _delta(terms: SecureTerms) -> Contribution:
    return Contribution(
        np.full(terms.size, 0.25, np.float32),
        np.full(terms.dense, 0.5, np.float32),
        20.0,
        sketch=np.full(terms.sketch, 0.125, np.float32),
    )


def refused(work: Callable[[], object]) -> None:
    """Insist on a typed refusal."""
    try:
        work()
    except DareError:
        return
    raise AssertionError("a step was taken twice")


def odd_terms(rng: random.Random, terms: SecureTerms) -> bytes:
    """Terms with fields that no honest server sets, in their own encoding."""
    mutant = object.__new__(SecureTerms)
    said = {one.name: getattr(terms, one.name) for one in fields(terms)}
    if rng.random() < 0.05:
        # Many parties, so that what follows from their number has to be computed.
        many = rng.choice((101, 300, 1000, MAX_MEMBERS))
        degree = 2 * rng.randrange(1, many // 2)
        said |= {
            "cohort": range(1, many + 1), "threshold": 2 * many // 3 + 1, "degree": degree,
            "share_threshold": degree // 2 + 1,
        }  # fmt: skip
    for name in rng.sample(sorted(_ODD), rng.choice((0, 1, 1, 1, 2, 3))):
        said[name] = rng.choice(_ODD[name])
    mutant.__dict__.update(said)
    try:
        return mutant.encode()
    except (struct.error, UnicodeEncodeError):
        return terms.encode()


def target(side: str) -> PartySide | ServerSide:
    """The side that gets the mutants."""
    return ServerSide() if side == "server" else PartySide()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--side", choices=SIDES, action="append", help="both by default")
    add_words(parser)
    words = parser.parse_args()
    for side in words.side or SIDES:
        rows = pieces(
            lambda side=side: target(side), words.messages,
            seed=words.seed, seconds=words.seconds, out=words.out,
        )  # fmt: skip
        show(rows)


if __name__ == "__main__":
    main()
