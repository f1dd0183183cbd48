"""Signed replies: whatever does not come from the client it names, as it was sent, is rejected."""

import json

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from dare_agg.deploy.identities import (
    check_identities,
    load_identity,
    make_identity,
    read_identities,
)
from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import DareStrategy
from dare_agg.flower.records import REPLY_KEY, UPDATE_KEY
from dare_agg.flower.transport import pack, unpack
from dare_agg.rounds.signing import reply_digest


@pytest.fixture
def keys(tmp_path):
    """Three clients' key files and the server's table of public keys."""
    paths = {str(n): tmp_path / f"client{n}.pem" for n in range(3)}
    return paths, {name: make_identity(path) for name, path in paths.items()}


def federate(memory_grid, toys, keys, *, tamper=None, node_config=None, rounds=1, **words):
    paths, known = keys

    def own(partition):
        return {
            "partition-id": partition,
            "num-partitions": 3,
            "identity": str(paths[str(partition)]),
        }

    grid = memory_grid(toys.app(), 3, tamper=tamper, node_config=node_config or own)
    outcomes = []
    strategy = DareStrategy(
        min_available_nodes=words.pop("available", 3),
        min_train_nodes=2,
        fraction_evaluate=0.0,
        seed=1,
        identities=known,
        round_hook=outcomes.append,
        deadline=5.0,
        node_timeout=2.0,
    )
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=rounds)
    return outcomes


def rejected(outcome):
    return {r.client: r.reason for r in outcome.rejections}


def test_signed_replies_are_merged(memory_grid, toys, keys):
    (outcome,) = federate(memory_grid, toys, keys)
    assert outcome.measurements["accepted"] == 3 and not outcome.rejections


def edited(reply: Message, **changes) -> Message:
    content = RecordDict({**reply.content, **changes})
    reply.content = content
    return reply


@pytest.mark.parametrize("what", ["weight", "none", "random", "payload"])
def test_an_altered_reply_is_rejected(memory_grid, toys, keys, what):
    def tamper(partition, reply):
        if partition != 1 or UPDATE_KEY not in reply.content:
            return reply
        receipt = ConfigRecord(dict(reply.content[REPLY_KEY]))
        if what == "weight":
            metrics = MetricRecord({**reply.content["metrics"], "num-examples": 1000})
            return edited(reply, metrics=metrics)
        if what == "payload":
            blob = bytearray(unpack(reply.content[UPDATE_KEY], 1 << 20))
            blob[-1] ^= 1
            return edited(reply, **{UPDATE_KEY: pack(bytes(blob))})
        if what == "none":
            del receipt["signature"]
        else:
            receipt["signature"] = np.random.default_rng(0).bytes(64)
        return edited(reply, **{REPLY_KEY: receipt})

    (outcome,) = federate(memory_grid, toys, keys, tamper=tamper)
    assert rejected(outcome) == {1: "signature"}
    assert outcome.measurements["accepted"] == 2


def test_a_replayed_reply_is_rejected(memory_grid, toys, keys):
    earlier = {}

    def tamper(partition, reply):
        if partition == 2 and UPDATE_KEY in reply.content:
            if "reply" in earlier:
                reply.content = earlier["reply"]
            else:
                earlier["reply"] = reply.content
        return reply

    first, second = federate(memory_grid, toys, keys, tamper=tamper, rounds=2)
    assert not first.rejections
    assert rejected(second) == {2: "round"}


def test_a_neighbours_reply_is_rejected(memory_grid, toys, keys):
    seen = {}

    def tamper(partition, reply):
        if UPDATE_KEY in reply.content:
            seen[partition] = reply.content
            if partition != 0 and 0 in seen:
                reply.content = seen[0]
        return reply

    outcomes = []
    try:
        outcomes = federate(memory_grid, toys, keys, tamper=tamper)
    except RunError as error:
        assert "plan" in str(error)
    if outcomes:
        assert set(rejected(outcomes[0]).values()) <= {"plan"}


def test_a_key_of_another_client_does_not_serve(memory_grid, toys, keys):
    paths, _ = keys

    def node_config(partition):
        return {"partition-id": partition, "num-partitions": 3, "identity": str(paths["0"])}

    (outcome,) = federate(memory_grid, toys, keys, node_config=node_config)
    assert rejected(outcome) == {1: "signature", 2: "signature"}


def test_strangers_do_not_take_part(memory_grid, toys, keys):
    paths, _ = keys

    def node_config(partition):
        name = str(partition) if partition else "mallory"
        return {"client-name": name, "partition-id": partition, "identity": str(paths["1"])}

    with pytest.raises(RunError, match="not among the 3 known"):
        federate(memory_grid, toys, keys, node_config=node_config)


def test_keys_are_private_and_never_overwritten(tmp_path):
    path = tmp_path / "k.pem"
    make_identity(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="never overwritten"):
        make_identity(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_identity(path)


def test_identity_tables_are_checked(tmp_path):
    public = make_identity(tmp_path / "a.pem")
    path = tmp_path / "clients.json"
    path.write_text(json.dumps({"a": public}))
    assert read_identities(path) == {"a": public}
    for wrong in ({}, {"a": "xyz"}, {"a": public, "b": public}, [public]):
        with pytest.raises(ConfigError):
            check_identities(wrong)


def test_the_digest_covers_every_part():
    parts = (b"p" * 32, b"blob", b"dense", {"metrics": {"num-examples": 3, "loss": 0.5}})
    digest = reply_digest(*parts)
    assert digest == reply_digest(*parts[:3], {"metrics": {"loss": 0.5, "num-examples": 3}})
    others = [(b"q" * 32, *parts[1:]), (parts[0], b"blobdense", b"", parts[3])]
    others.append((*parts[:3], {"metrics": {"num-examples": 4, "loss": 0.5}}))
    assert digest not in [reply_digest(*other) for other in others]
