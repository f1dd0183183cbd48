"""The server asks a party of secure sums for anything but who it is and the protocol."""

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from guarded import SECRET, Parties, base_arrays, bytes_of, digest_of, learner, quick_keys

from dare_agg.flower.records import ORDER_KEY
from dare_agg.flower.secure.gate import KEPT_HERE
from dare_agg.flower.secure.records import SECURE_KEY, Begin, Introduce, Step, Train, content_of
from dare_agg.flower.transport import to_record
from dare_agg.rounds.messages import Order


@pytest.fixture
def parties(tmp_path, monkeypatch):
    quick_keys(monkeypatch)
    return Parties(tmp_path, learner(), 3)


def plain(**more):
    return RecordDict(
        {"arrays": to_record(base_arrays()), "config": ConfigRecord({"lr": 0.1}), **more}
    )


def hello(**words):
    return ConfigRecord(
        Order(ask="hello", downlink="full", arrays_key="arrays", **words).to_record()
    )


def terms_of(parties):
    arrays = base_arrays()
    return parties.terms(arrays, training=digest_of(arrays, {"lr": 0.1}, {})).encode()


ASKED = {
    "training in the clear": ("train", lambda p: plain()),
    "another training function": ("train.other", lambda p: plain()),
    "evaluation": ("evaluate", lambda p: plain()),
    "another evaluation": ("evaluate.other", lambda p: plain()),
    "the app's own query": ("query.describe", lambda p: plain()),
    "a query that raises": ("query.initial", lambda p: plain()),
    "a query dressed as secure training": (
        "query.describe",
        lambda p: plain(**{SECURE_KEY: ConfigRecord(Train(terms=terms_of(p)).to_record())}),
    ),
    "a query dressed as a hello": ("query.describe", lambda p: plain(**{ORDER_KEY: hello()})),
    "an evaluation dressed as a hello": ("evaluate", lambda p: plain(**{ORDER_KEY: hello()})),
    "an evaluation dressed as secure training": (
        "evaluate",
        lambda p: plain(**{SECURE_KEY: ConfigRecord(Train(terms=terms_of(p)).to_record())}),
    ),
    "training dressed as a hello": ("train", lambda p: plain(**{ORDER_KEY: hello()})),
    "training dressed as a hello, arrays elsewhere": (
        "train",
        lambda p: RecordDict({"x": to_record(base_arrays()), ORDER_KEY: hello()}),
    ),
    "training with a stage that is none": (
        "train",
        lambda p: plain(**{SECURE_KEY: ConfigRecord({"stage": "TRAIN"})}),
    ),
    "training with a record of another kind": (
        "train",
        lambda p: plain(**{SECURE_KEY: MetricRecord({"stage": 1})}),
    ),
}


@pytest.mark.parametrize("what", ASKED)
def test_turned_away_before_any_code_of_the_app_runs(parties, what, caplog):
    kind, content = ASKED[what]
    reply = parties.send(parties.ids[0], content(parties), kind)
    assert reply.has_error() and reply.error.code == 2
    assert reply.error.reason == "this node takes part in secure sums only: refused"
    assert SECRET.encode() not in bytes_of(reply)
    # Whoever runs the node reads what was asked of it.
    assert any(kind in record.getMessage() for record in caplog.records)


def test_a_hello_is_answered_by_the_library_not_by_training_code(parties):
    reply = parties.send(parties.ids[0], RecordDict({ORDER_KEY: hello()}), "train")
    assert set(reply.content) == {"dare.reply"}
    assert set(reply.content["dare.reply"]) <= {"codec", "package", "name", "have", "uplink-kbit-s"}


def test_an_evaluation_that_the_party_allows_tells_numbers_only(tmp_path, monkeypatch):
    quick_keys(monkeypatch)
    parties = Parties(tmp_path, learner(), 3, node=lambda number: {"secure-evaluate": True})
    reply = parties.send(parties.ids[0], plain(), "evaluate")
    assert list(reply.content) == ["metrics"] and SECRET.encode() not in bytes_of(reply)


def leaks():
    raise ValueError(f"could not convert string to float: '{SECRET}'")


def test_an_exception_of_the_training_code_stays_here(tmp_path, monkeypatch, caplog):
    quick_keys(monkeypatch)
    parties = Parties(tmp_path, learner(fails=leaks), 3)
    arrays = base_arrays()
    terms = parties.terms(arrays, training=digest_of(arrays, {"lr": 0.1}, {}))
    assert set(parties.round(terms, lambda party: (arrays, {"lr": 0.1}, {})).values()) == {
        "refused"
    }
    for reply in parties.replies:
        assert reply.content["dare.secure"]["detail"] == KEPT_HERE
        assert SECRET.encode() not in bytes_of(reply)
    assert SECRET in caplog.text


@pytest.mark.parametrize(
    "word", ["/root", "/etc/passwd", "/nonexistent", "minilm", "../own", "https://evil/model"]
)
def test_whether_a_path_exists_is_not_told(tmp_path, monkeypatch, word):
    """The base is where the node says; the run's word is not even looked at."""
    quick_keys(monkeypatch)
    own = {"model-path": str(tmp_path / "own.safetensors")}
    parties = Parties(tmp_path, learner(), 3, node=lambda number: own)
    begin = Begin(terms=terms_of(parties), model=word)
    reply = parties.send(parties.ids[0], content_of(begin), "query.secure")
    assert reply.content["dare.secure"]["refused"] == "refused"
    assert reply.content["dare.secure"]["detail"] == KEPT_HERE
    assert str(tmp_path).encode() not in bytes_of(reply)


def test_where_files_lie_is_not_told(tmp_path, monkeypatch):
    """Model, base, passphrase, state or merged-path: each fails in the same words."""
    quick_keys(monkeypatch)
    taken = tmp_path / "merged"
    taken.mkdir()
    broken = (
        {"model-path": str(tmp_path / "absent"), "base-path": "/etc/passwd"},
        {"model-path": "/root", "base-path": str(tmp_path / "absent")},
        {"secure-passphrase-file": str(tmp_path / "absent")},
        {"secure-identity": str(tmp_path / "absent.key")},
        {"secure-roster": "/etc/hostname"},
    )
    said = set()
    for number, node in enumerate(broken):
        folder = tmp_path / str(number)
        folder.mkdir()
        parties = Parties(folder, learner(), 3, node=lambda number, node=node: node)
        begin = content_of(Begin(terms=terms_of(parties)))
        reply = parties.send(parties.ids[0], begin, "query.secure")
        said.add(tuple(sorted((k, str(v)) for k, v in reply.content["dare.secure"].items())))
        assert str(tmp_path).encode() not in bytes_of(reply)
    assert len(said) == 1


@pytest.mark.parametrize("stage", ["share", "contribute", "sign", "reveal", "result"])
def test_stages_of_no_session(parties, stage):
    step = content_of(Step(stage=stage, session=bytes(32)), b"x")
    reply = parties.send(parties.ids[0], step, "query.secure")
    assert "refused" in reply.content["dare.secure"]
    assert set(reply.content) == {"dare.secure"}


def test_a_proof_is_of_no_use_to_another_node(parties):
    reply = parties.send(parties.ids[0], content_of(Introduce(challenge=b"c" * 32)), "query.secure")
    assert set(reply.content["dare.secure"]) == {
        "codec", "package", "stage", "public", "signature"
    }  # fmt: skip
