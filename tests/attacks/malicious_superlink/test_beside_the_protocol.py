"""The server puts more into a protocol query or a hello than belongs there."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from guarded import Parties, base_arrays, bytes_of, learner, quick_keys

from dare_agg.downlink.base import write_base
from dare_agg.flower import reception
from dare_agg.flower.records import DOWN_PREFIX, ORDER_KEY
from dare_agg.flower.secure.records import Introduce, content_of
from dare_agg.flower.transport import pack
from dare_agg.rounds.messages import Order
from dare_agg.vectors.model import global_model


def an_order(ask, base, **words):
    return Order(
        ask=ask,
        downlink="versions",
        version="" if ask == "hello" else base,
        arrays_key="arrays",
        facts={"base-version": base},
        **words,
    )


TURNED_AWAY = "this node takes part in secure sums only: refused"


@pytest.fixture
def parties(tmp_path, monkeypatch):
    quick_keys(monkeypatch)
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    return Parties(tmp_path, learner(), 3)


def introduce(order):
    return RecordDict(
        {**content_of(Introduce(challenge=bytes(32))), ORDER_KEY: ConfigRecord(order.to_record())}
    )


@pytest.mark.parametrize("ask", ["hello", "evaluate", "train"])
def test_reading_paths_and_the_cache_by_an_order_beside_a_query(parties, tmp_path, ask):
    """The mod for plain updates would answer it in words of its own, and on training keep for
    the party's head what the query answered."""
    order = an_order(ask, "ab" * 32)
    reply = parties.send(parties.ids[0], introduce(order), "query.secure")
    assert reply.has_error() and reply.error.reason == TURNED_AWAY
    assert str(tmp_path).encode() not in bytes_of(reply)


def asks_for(base, **config):
    order = ConfigRecord(an_order("hello", base).to_record())
    return RecordDict({ORDER_KEY: order, "config": ConfigRecord(config)})


def test_an_oracle_of_files_and_labels_by_hellos(parties, monkeypatch):
    """`offer_base` would make a head for the labels the server guesses: have says if they fit."""
    asked = []

    def own_base(message, context):
        asked.append(dict(message.content["config"]))
        return {"head.bias": np.zeros(len(message.content["config"]["labels"]), np.float32)}

    monkeypatch.setattr(reception, "_OFFERS", [own_base])
    guess = global_model({"head.bias": np.zeros(2, np.float32)}).ref.version
    reply = parties.send(parties.ids[0], asks_for(guess, labels=["well", "Z99"]), "train")
    assert "have" not in reply.content["dare.reply"] and asked == []


def test_what_another_consortium_had_a_party_keep(parties, tmp_path):
    """A server that knows the fingerprint of another's base learns not whether a party has it,
    and cannot put other buffers beside that base."""
    base = base_arrays()
    name = global_model(base).ref.version
    first = parties.ids[0]
    payload = {DOWN_PREFIX + "base": pack(write_base(base))}
    train = {ORDER_KEY: ConfigRecord(an_order("train", name).to_record()), **payload}
    theirs = {**parties.nodes[first], "secure-roster": str(tmp_path / "other.json")}
    (tmp_path / "other.json").write_bytes((tmp_path / "roster.json").read_bytes())
    secure = content_of(Introduce(challenge=bytes(32)))["dare.secure"]
    secure["stage"], secure["terms"] = "train", parties.terms(base, training=b"t" * 32).encode()
    parties.send(first, RecordDict({**train, "dare.secure": secure}), "train")
    assert parties.send(first, asks_for(name), "train").content["dare.reply"]["have"] == name
    parties.nodes[first] = theirs
    assert "have" not in parties.send(first, asks_for(name), "train").content["dare.reply"]
