"""A SuperLink damages the records of every message to a party: fixed words, nothing else."""

import random
from time import process_time

import pytest
from damaged import damaged_content
from flwr.app import ConfigRecord, RecordDict
from guarded import SECRET, Parties, base_arrays, bytes_of, digest_of, learner, quick_keys

from dare_agg.flower.records import ORDER_KEY, REPLY_KEY, read_refusal
from dare_agg.flower.secure.gate import KEPT_HERE, TOLD, TURNED_AWAY
from dare_agg.flower.secure.records import (
    MESSAGE_KEY,
    SECURE_KEY,
    Begin,
    Introduce,
    content_of,
)
from dare_agg.rounds.messages import Order

COUNT = 250


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_records_of_every_message(tmp_path, monkeypatch, seed):
    quick_keys(monkeypatch)
    parties = Parties(tmp_path, learner(), 3)
    seen: list[tuple[int, RecordDict, str]] = []
    send = parties.send

    def noted(party, content, kind, run=None):
        seen.append((party, RecordDict(dict(content.items())), kind))
        return send(party, content, kind, run)

    parties.send = noted
    arrays = base_arrays()
    terms = parties.terms(arrays, training=digest_of(arrays, {"lr": 0.1}, {}))
    assert parties.round(terms, lambda party: (arrays, {"lr": 0.1}, {})) == {}
    party = parties.ids[0]
    hello = ConfigRecord(Order(ask="hello", downlink="full", arrays_key="arrays").to_record())
    seen.append((party, RecordDict({ORDER_KEY: hello}), "train"))
    seen.append((party, content_of(Introduce(challenge=bytes(32))), "query.secure"))
    seen.append((party, content_of(Begin(terms=terms.encode())), "query.secure"))
    parties.send, rng = send, random.Random(seed)
    kinds = ("train", "query.secure", "evaluate", "query.describe", "train.other")
    for _ in range(COUNT):
        to, content, kind = rng.choice(seen)
        kind = rng.choice(kinds) if rng.random() < 0.1 else kind
        mutant = damaged_content(rng, content)
        target = rng.choice(parties.ids) if rng.random() < 0.1 else to
        began = process_time()
        reply = send(target, mutant, kind)
        if process_time() - began >= 1:  # a garbage collection is not slow twice, a bomb is
            began = process_time()
            send(target, mutant, kind)
            assert process_time() - began < 1
        told = bytes_of(reply)
        assert SECRET.encode() not in told and str(tmp_path).encode() not in told
        if reply.has_error():
            assert reply.error.reason in (KEPT_HERE, TURNED_AWAY)
            continue
        assert set(reply.content) <= {SECURE_KEY, MESSAGE_KEY, REPLY_KEY}
        for key in (SECURE_KEY, REPLY_KEY):
            refusal = read_refusal(reply, key)
            assert refusal is None or refusal.reason in TOLD | {"refused"}
