"""The records of secure sums inside Flower's messages, and who a node is.

To a party: ``dare.secure`` (`Introduce`, `Train`, `Begin` or `Step`) and, from the second stage
on, the protocol's message as ``dare.secure.message``. Back: ``dare.secure`` (`Proof`, `Answered`,
`Merged` or a `Refusal`) and the protocol's message.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from flwr.app import ConfigRecord, Message, RecordDict

from dare_agg.errors import ProtocolError
from dare_agg.flower.internals import FailureCode
from dare_agg.flower.records import OURS, failure_of, read_config, read_payload, read_refusal
from dare_agg.flower.transport import pack
from dare_agg.rounds.fields import Record, raw, read_fields, said, text, words_of
from dare_agg.rounds.messages import SameCode, one_line
from dare_agg.secure.party import REQUESTS
from dare_agg.vectors.model import ModelRef

SECURE_KEY = OURS + "secure"
MESSAGE_KEY = SECURE_KEY + ".message"
QUERY = "secure"

HELLO, TRAIN, ADVERTISE, RESULT = "hello", "train", "advertise", "result"
CONTRIBUTE = "contribute"


@dataclass(frozen=True, kw_only=True)
class Staged(SameCode):
    """What every record of a secure sum says: the stage it belongs to."""

    stage: str = said("")


@dataclass(frozen=True, kw_only=True)
class Introduce(Staged):
    """Asks a node to prove which party it is, over a fresh challenge."""

    stage: str = said(HELLO)
    challenge: bytes = raw(32)


@dataclass(frozen=True, kw_only=True)
class Train(Staged):
    """Asks a party to train for a sum on these terms; the order beside it says on what.

    ``weighted_by_key`` names the metric that weighs it, "" where all count alike; ``after`` the
    session whose local tensors it begins with, b"" to begin with the party's own base's.
    """

    stage: str = said(TRAIN)
    terms: bytes = raw()
    weighted_by_key: str = text(default="")
    after: bytes = raw(32, b"")


@dataclass(frozen=True, kw_only=True)
class Begin(Staged):
    """Asks a party to take part with the model it has, on these terms.

    ``model`` is the run's word for the base, for nodes that do not say where theirs is.
    """

    stage: str = said(ADVERTISE)
    terms: bytes = raw()
    model: str = text(default="")


@dataclass(frozen=True, kw_only=True)
class Step(Staged):
    """Asks for a later stage of a session; the protocol's message is beside it."""

    session: bytes = raw(32)
    model: str = text(default="")


@dataclass(frozen=True, kw_only=True)
class Proof(Staged):
    """Which party a node is: its public key, and its signature over `hello_input`."""

    stage: str = said(HELLO)
    public: bytes = raw(32)
    signature: bytes = raw(64)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """Read a proof; raises `ProtocolError` (reason "malformed")."""
        return cls(**read_fields(cls, record, _malformed))


@dataclass(frozen=True, kw_only=True)
class Answered(Staged):
    """A party's answer; the protocol's message is beside it."""


@dataclass(frozen=True, kw_only=True)
class Merged(Staged):
    """The fingerprint of what a party holds with the result put on."""

    stage: str = said(RESULT)
    merged: str = text("[0-9a-f]{64}")

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """Read a fingerprint; raises `ProtocolError` (reason "malformed")."""
        return cls(**read_fields(cls, record, _malformed))


Request = Introduce | Train | Begin | Step
_REQUESTS: Mapping[str, type[Introduce | Train | Begin | Step]] = {
    HELLO: Introduce,
    TRAIN: Train,
    ADVERTISE: Begin,
    RESULT: Step,
    **dict.fromkeys(REQUESTS, Step),
}


def stage_of(record: Mapping[str, Any]) -> str:
    """The stage a record names, fit to be logged."""
    return one_line(record.get(words_of(Staged)["stage"], ""), 32)


def read_request(record: Mapping[str, Any]) -> Request:
    """Read what the server asks of a party.

    Raises `UpdateError` for other code, `ProtocolError` for an unknown stage (reason "stage") or
    a field that is missing or of another form (reason "malformed").
    """
    SameCode.check_sender(record, "server", "this client")
    stage = stage_of(record)
    kind = _REQUESTS.get(stage)
    if kind is None:
        raise ProtocolError(f"stage {stage!r} is unknown", reason="stage")
    return kind(stage=stage, **read_fields(kind, record, _malformed))


def content_of(record: Record, message: bytes | None = None) -> RecordDict:
    """The records of one request or answer, with the protocol's message where there is one."""
    content = RecordDict({SECURE_KEY: ConfigRecord(record.to_record())})
    if message is not None:
        content[MESSAGE_KEY] = pack(message)
    return content


def answer_record(reply: Message) -> ConfigRecord:
    """The record of an answer; raises `ProtocolError` for a failure or a refusal."""
    if reply.has_error():
        # A SuperNode that is pinned to an app (dare-agg supernode).
        other = reply.error.code == FailureCode.WRONG_BUNDLE
        hint = " Its SuperNode runs another copy of the app" if other else ""
        reason, detail = failure_of(reply)
        raise ProtocolError(f"{detail}{hint}", reason=reason)
    record = read_config(reply.content, SECURE_KEY)
    if record is None:
        raise ProtocolError(
            "its app does not answer secure sums; call secure_queries(app) and put secure_mod "
            "first among its mods",
            reason="mod",
        )
    refusal = read_refusal(reply, SECURE_KEY)
    if refusal is not None:
        raise ProtocolError(f"it refused: {refusal.detail}", reason=refusal.reason)
    SameCode.check_sender(record, "the client", "this server")
    return record


def read_message(content: RecordDict, limit: int) -> bytes:
    """Return the protocol's message; raises `ProtocolError` where there is none."""
    found = read_payload(content, MESSAGE_KEY, limit)
    if found is None:
        raise _malformed("the protocol's message is missing")
    return found


def names_of(ref: ModelRef) -> tuple[str, str]:
    """Base and layout, as the terms name them: of both parts where there is a dense one."""
    if not ref.dense_size:
        return ref.base, ref.layout
    both = hashlib.sha256(f"{ref.layout} {ref.dense_layout}".encode()).hexdigest()
    return ref.version, both


def hello_input(challenge: bytes, node: int) -> bytes:
    """What a node signs to say which party it is: fresh, and of no use to another node."""
    return b"dare-agg secure hello 1\0" + challenge + struct.pack("<Q", node % (1 << 64))


def _malformed(what: str) -> ProtocolError:
    return ProtocolError(f"secure sum: {what}", reason="malformed")
