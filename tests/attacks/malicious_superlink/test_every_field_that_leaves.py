"""Every field of every answer of secure parties, in whole runs with a failure at each stage."""

import re

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord
from guarded import SECRET, Parties, base_arrays, bytes_of, learner, quick_keys
from safetensors.numpy import load_file, save_file

from dare_agg.errors import REASONS, DareError, RunError
from dare_agg.flower.secure.gate import KEPT_HERE, TOLD
from dare_agg.flower.secure.merge import secure_merge
from dare_agg.flower.secure.strategy import SecureStrategy
from dare_agg.secure.settings import SecureSettings
from simulations.runs.memory_grid import MemoryGrid

HEX16, HEX64 = r"[0-9a-f]{16}", r"[0-9a-f]{64}"
STAGES = "hello|train|advertise|share|contribute|sign|reveal|result"
TURNED_AWAY = (2, "this node takes part in secure sums only: refused")
TEXTS = {REASONS[reason] for reason in TOLD} | {KEPT_HERE}

# Record and field → what may stand there. Nothing else leaves a party.
ALLOWED = {
    "dare.secure": {
        "codec": r"1",
        "package": HEX16,
        "stage": STAGES,
        "public": rb".{32}",
        "signature": rb".{64}",
        "merged": HEX64,
        "refused": "|".join(re.escape(reason) for reason in [*TOLD, "refused"]),
        "detail": "|".join(re.escape(text) for text in TEXTS),
        "lost": "True|False",
        "have": HEX64,
    },
    "dare.secure.message": {},
    "dare.reply": {
        "codec": r"1",
        "package": HEX16,
        "name": r"party-\d",
        "have": HEX64,
        "uplink-kbit-s": r"512\.0",
    },
}


def check(reply):
    """Hold one answer against the list; returns the fields it had."""
    if reply.has_error():
        assert (reply.error.code, reply.error.reason) == TURNED_AWAY
        return {"error"}
    found = set()
    for key, record in reply.content.items():
        assert key in ALLOWED, key
        if isinstance(record, ArrayRecord):
            assert key == "dare.secure.message"
            # The protocol's own bytes: signed, masked or sealed (tests/secure).
            assert all(a.dtype == "uint8" and a.stype for a in record.values())
            found.add(key)
            continue
        assert isinstance(record, ConfigRecord)
        for field, value in record.items():
            assert field in ALLOWED[key], (key, field, value)
            pattern = ALLOWED[key][field]
            if isinstance(pattern, bytes):
                assert re.fullmatch(pattern, value, re.DOTALL), (field, value)
            else:
                assert re.fullmatch(pattern, str(value)), (field, value)
            found.add(f"{key}:{field}")
    return found


def grid_of(parties, *, disturb=None):
    """A grid of the guarded nodes; ``disturb(stage, message)`` edits what a server sends."""
    nodes = [parties.nodes[party] for party in parties.ids]
    more = {"uplink-kbit-s": 512.0}
    grid = MemoryGrid(
        parties.app,
        len(nodes),
        node_config=lambda i: {**nodes[i], **more, "client-name": f"party-{i}"},
    )
    if disturb is not None:
        push = grid.push_messages

        def pushed(messages):
            messages = list(messages)
            for number, message in enumerate(messages):
                record = message.content.config_records.get("dare.secure")
                if record is not None and number == 0:
                    disturb(str(record.get("stage")), message)
            return push(messages)

        grid.push_messages = pushed
    return grid


def breaker(stage, how):
    def disturb(at, message):
        record = message.content["dare.secure"]
        if at != stage:
            return
        if how == "message" and "dare.secure.message" in message.content:
            old = message.content["dare.secure.message"]["0"]
            data = bytes([old.data[0] ^ 1]) + old.data[1:-1]
            message.content["dare.secure.message"]["0"] = Array(
                dtype="uint8", shape=(len(data),), stype=old.stype, data=data
            )
        elif how == "session" and "session" in record:
            record["session"] = bytes(32)
        elif how == "terms" and "terms" in record:
            record["terms"] = record["terms"][:-1] + b"\xff"
        elif how == "words":
            record["stage"] = "../../etc/passwd"
        elif how == "type":
            for key in list(record):
                if key not in ("stage", "codec", "package"):
                    record[key] = 7

    return disturb


HOWS = ["message", "session", "terms", "words", "type"]
LATER = ["share", "contribute", "sign", "reveal"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    quick_keys(monkeypatch)

    def run(disturb=None):
        parties = Parties(tmp_path, learner())
        grid = grid_of(parties, disturb=disturb)
        strategy = SecureStrategy(
            secure=SecureSettings("mean", drop_rate="0.5", clip=0.05),
            roster=parties.roster,
            stage_seconds=5,
            fraction_evaluate=0.0,
            seed=3,
        )
        arrays = ArrayRecord({name: Array(array) for name, array in base_arrays().items()})
        try:
            strategy.start(grid, arrays, num_rounds=1)
        except RunError:
            assert disturb is not None
        return grid

    return run


@pytest.fixture
def merged(tmp_path, monkeypatch):
    quick_keys(monkeypatch)

    def run(disturb=None):
        base = base_arrays()
        save_file(base, tmp_path / "base.safetensors")
        for number in range(4):
            rng = np.random.default_rng(number)
            tuned = {k: a + rng.normal(0, 0.01, a.shape).astype("f4") for k, a in base.items()}
            save_file({**tuned, "head": np.ones(3)}, tmp_path / f"own{number}.safetensors")

        def node(number):
            return {
                "base-path": str(tmp_path / "base.safetensors"),
                "model-path": str(tmp_path / f"own{number}.safetensors"),
                "merged-path": str(tmp_path / f"merged{number}.safetensors"),
            }

        parties = Parties(tmp_path, learner(), node=node)
        grid = grid_of(parties, disturb=disturb)
        try:
            secure_merge(
                grid,
                tmp_path / "base.safetensors",
                parties.roster,
                SecureSettings("ties", drop_rate="0.5", clip=0.1),
                run="merge",
                stage_seconds=5,
            )
        except DareError:
            assert disturb is not None
        return grid

    return run


def fields_of(grid):
    found = set()
    for reply in grid.received:
        found |= check(reply)
        assert SECRET.encode() not in bytes_of(reply) and b"/tmp" not in bytes_of(reply)
    return found


def test_of_a_training_round(trained):
    found = fields_of(trained())
    assert {"dare.secure:signature", "dare.secure.message", "dare.reply:name"} <= found
    assert "dare.secure:refused" not in found


def test_of_a_merge(merged, tmp_path):
    found = fields_of(merged())
    assert "dare.secure:merged" in found and "dare.secure:refused" not in found
    assert load_file(tmp_path / "merged0.safetensors")["head"].shape == (3,)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("stage", ["hello", "train", *LATER])
def test_of_a_training_round_that_fails(trained, stage, how):
    fields_of(trained(breaker(stage, how)))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("stage", ["hello", "advertise", *LATER, "result"])
def test_of_a_merge_that_fails(merged, stage, how):
    fields_of(merged(breaker(stage, how)))


@pytest.mark.parametrize(("stage", "how"), [("train", "words"), ("share", "message")])
def test_of_a_round_that_fails(trained, stage, how):
    """Two of the many below, for the fast path."""
    fields_of(trained(breaker(stage, how)))


def test_the_list_itself_refuses_what_is_not_on_it(trained):
    reply = trained().received[0]
    reply.content["dare.reply"]["loss"] = 0.1
    with pytest.raises(AssertionError):
        check(reply)
