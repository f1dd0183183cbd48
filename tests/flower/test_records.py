"""What crosses Flower: frozen classes, read without trust, each word in one place."""

import ast
import math
from dataclasses import fields
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.errors import REASONS, BaseMismatchError, ConfigError, DareError, UpdateError
from dare_agg.flower import records
from dare_agg.flower.secure import records as secure
from dare_agg.flower.workers import WORKER_DIED
from dare_agg.rounds.fields import words_of
from dare_agg.rounds.messages import (
    ASK_EVALUATE,
    ASK_HELLO,
    ASK_TRAIN,
    Held,
    Hello,
    Order,
    Receipt,
    Refusal,
)
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import ModelRef

ROOM = Path(records.__file__).parents[1]
VERSION = "ab" * 32
PLAN = make_plans(
    bytes(32),
    3,
    [None],
    UpdateTerms(dense=("^head",)),
    ModelRef("11" * 32, "22" * 32, 1000, "33" * 32, "44" * 32, 10),
    run="r",
)[0]
ORDER = Order(
    ask=ASK_TRAIN,
    version=VERSION,
    downlink="versions",
    arrays_key="weights",
    dense=("^head",),
    exclude=("buffer",),
    facts={"base-version": VERSION},
)


def one_of(kind):
    """An instance with every field set, and one with what is needed alone."""
    values = {
        "str": "3f" * 32, "bytes": b"x" * 32, "int": 4, "float": 0.25, "bool": True,
        "tuple[str, ...]": ("a", "b"),
    }  # fmt: skip
    given = {
        field.name: values[str(field.type)] for field in fields(kind) if "check" in field.metadata
    }
    if "signature" in given:
        given["signature"] = bytes(64)
    if kind is Receipt:
        given["plan"] = bytes(16)
    if kind is Refusal:
        given["reason"] = "base"
    return kind(**given)


@pytest.mark.parametrize("kind", [Hello, Receipt, Held, Refusal, secure.Proof, secure.Merged])
def test_what_is_said_is_read(kind):
    full = one_of(kind)
    assert kind.read(full.to_record()) == full


@pytest.mark.parametrize("order", [
    ORDER,
    Order(ask=ASK_HELLO, downlink="full", arrays_key="arrays"),
    Order(ask=ASK_EVALUATE, downlink="versions", arrays_key="a", facts={"base-version": VERSION}),
    Order(ask=ASK_TRAIN, downlink="full", arrays_key="a", plan=PLAN, dense=PLAN.terms.dense),
])  # fmt: skip
def test_orders_are_read(order):
    record = order.to_record()
    assert Order.read(record, planned=order.plan is not None) == order


@pytest.mark.parametrize(
    "request_",
    [
        secure.Introduce(challenge=bytes(32)),
        secure.Train(terms=b"t", weighted_by_key="n"),
        secure.Begin(terms=b"t", model="m"),
        secure.Step(stage="share", session=bytes(32), model="m"),
        secure.Step(stage=secure.RESULT, session=bytes(32)),
    ],
)
def test_secure_requests_are_read(request_):
    assert secure.read_request(request_.to_record()) == request_


def test_none_is_an_absent_field():
    assert set(Held().to_record()) == set()
    assert set(Hello(name="a").to_record()) == {"codec", "package", "name"}
    assert set(Refusal.of(UpdateError("text", reason="late")).to_record()) == {"refused", "detail"}
    receipt = Receipt.of(PLAN, delta_norm=1.0, delta_max=1.0, share_above=0.0)
    assert set(receipt.to_record()) == {
        "codec", "package", "round", "plan", "delta-norm", "delta-max", "share-above",
    }  # fmt: skip


def test_a_lost_version_is_told_from_other_refusals():
    lost = Refusal.of(BaseMismatchError("text"), VERSION)
    other = Refusal.of(UpdateError("text", reason="base"), VERSION)
    assert lost.lost and lost.have == VERSION
    assert not other.lost and not other.have and other.reason == lost.reason == "base"


def test_unknown_reasons_and_loud_details_are_tamed():
    record = ConfigRecord({"refused": "rm -rf", "detail": "a\nb\x1b[2J" + "x" * 900})
    refusal = Refusal.read(record)
    assert refusal is not None and refusal.reason == "refused" and refusal.reason in REASONS
    assert "\n" not in refusal.detail and "\x1b" not in refusal.detail
    assert len(refusal.detail) <= 300
    assert Refusal.read(ConfigRecord({"detail": "no reason"})) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ask": "launch"}, "version"),
        ({"codec": "1"}, "version"),
        ({"package": "0" * 16}, "package"),
        ({"version": "not hex"}, "malformed"),
        ({"version": 3}, "malformed"),
        ({"dense": "^head"}, "malformed"),
        ({"exclude": [1, 2]}, "malformed"),
        ({"arrays-key": b"weights"}, "malformed"),
        ({"arrays-key": "x" * 5000}, "malformed"),
        ({"downlink": "pigeons"}, "config"),
        ({"downlink": 7}, "malformed"),
    ],
)
def test_orders_that_cannot_be_followed_say_why(change, reason):
    record = ConfigRecord({**ORDER.to_record(), **change})
    with pytest.raises(DareError) as caught:
        Order.read(record, planned=False)
    assert caught.value.reason == reason
    with pytest.raises(UpdateError, match="round plan"):
        Order.read(ORDER.to_record())


def test_a_malformed_field_of_a_reply_counts_as_absent():
    record = Receipt.of(PLAN, have=VERSION).to_record()
    wrong = {"delta-norm": math.inf, "have": "-", "signature": b"short", "statistics": "gram"}
    read = Receipt.read(ConfigRecord({**record, **wrong}))
    assert math.isnan(read.delta_norm) and read.have == "" and read.signature == b""
    assert read.statistics == ()
    with pytest.raises(UpdateError) as caught:
        Receipt.read(ConfigRecord({**record, "round": -3})).check_answers(PLAN)
    assert caught.value.reason == "round"


@pytest.mark.parametrize(
    ("field", "value"),
    [("challenge", None), ("challenge", b"short"), ("challenge", "text"), ("stage", "dance")],
)
def test_secure_requests_must_be_whole(field, value):
    record = secure.Introduce(challenge=bytes(32)).to_record()
    if value is None:
        del record[field]
    else:
        record[field] = value
    with pytest.raises(DareError) as caught:
        secure.read_request(record)
    assert caught.value.reason == ("stage" if field == "stage" else "malformed")


KINDS = [Hello, Receipt, Held, Refusal, Order, secure.Proof, secure.Merged]
VALUES = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.booleans(),
    st.text(max_size=8),
    st.binary(max_size=70),
    st.lists(st.text(max_size=3), max_size=3),
    st.lists(st.integers(0, 9), max_size=3),
)
WORDS = sorted({word for kind in KINDS for word in words_of(kind).values()} | {"base-version"})


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=6),
    st.booleans(),
)
def test_whatever_comes_is_read_or_refused_by_its_reason(kind, changes, honest):
    start = ORDER.to_record() if kind is Order else one_of(kind).to_record()
    record = {**start, **changes} if honest else changes
    try:
        read = kind.read(record)
    except DareError as error:
        assert error.reason in REASONS
    else:
        assert read is None or isinstance(read, kind)


def test_unknown_downlinks_are_named():
    record = ConfigRecord({**ORDER.to_record(), "downlink": "pigeons"})
    with pytest.raises(ConfigError, match=r"'pigeons' is unknown.*full, versions"):
        Order.read(record)


def test_a_payload_of_another_kind_is_no_payload():
    with pytest.raises(UpdateError) as caught:
        records.read_payload(RecordDict({"k": ConfigRecord({})}), "k", 9)
    assert caught.value.reason == "transport"


def written(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [str(node.value) for node in nodes if isinstance(node, ast.Constant)]


def test_no_word_is_written_a_second_time():
    """Words of records are their fields' names; none is written where records are used."""
    kinds = [*KINDS, secure.Introduce, secure.Train, secure.Begin, secure.Step]
    words = {word for kind in kinds for word in words_of(kind).values() if "-" in word}
    # The node config says it in the same word.
    words -= {"uplink-kbit-s"}
    assert {"delta-norm", "weighted-by-key", "arrays-key"} <= words
    everything = [text for path in ROOM.rglob("*.py") for text in written(path)]
    assert not words & set(everything)
    keys = {v for k, v in vars(records).items() if k.endswith("_KEY")} | {secure.SECURE_KEY}
    assert len(keys) == 6 and not keys & set(everything)
    for word in ("base-version", "server-round", "start-seed"):
        assert everything.count(word) == 1


def test_nothing_asks_a_downlink_or_a_receiver_for_its_class():
    halves = {"FullDownlink", "VersionDownlink", "FullReceiver", "VersionReceiver"}
    halves |= {"VersionStore", "ChainReceiver"}
    for path in ROOM.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                named = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not named & halves, path


def test_a_dead_worker_is_told_from_an_app_that_failed():
    query = Message(RecordDict(), 1, "train")
    died = f"<class 'RunError'>:<'{WORKER_DIED}'>"
    for text, reason in ((died, "worker"), ("<class 'ValueError'>:<'no'>", "client-error")):
        reply = Message(Error(code=0, reason=text), reply_to=query)
        assert records.failure_of(reply)[0] == reason in REASONS


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ("<class 'KeyError'>:<''tone''>", "KeyError: 'tone'"),
        ("<class 'dare_agg.errors.ConfigError'>:<'no file'>", "ConfigError: no file"),
        (
            "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'\x1b[36mray::run()\n"
            "  File \"x.py\", line 1\nKeyError: 'a'\n\nThe above exception was the cause\n\n"
            "ClientAppException: \nException ClientAppException occurred. Message: two\nlines'>",
            "two lines",
        ),
        ("Traceback:\n  File\nValueError: last", "ValueError: last"),
        ("Node unavailable", "Node unavailable"),
        ("", "no text"),
    ],
)
def test_what_an_app_raised_is_said_without_what_is_around_it(sent, said):
    asked = Message(RecordDict(), 1, "train")
    asked.metadata.__dict__["_message_id"] = "1"
    assert records.said_by(Message(Error(2, sent), reply_to=asked)) == said
