"""The records that strategy and mod add to Flower's messages, as frozen classes.

To a client: ``dare.order`` (`Order`) and, where the downlink sends payloads,
``dare.down.<name>``. Back: ``dare.reply`` (`Hello`, `Receipt`, `Held` or `Refusal`) with the
update's payloads ``dare.update``, ``dare.dense`` and ``dare.statistics``. The app's own records
travel beside them untouched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict

from dare_agg.codec.update_spec import CODEC_VERSION
from dare_agg.downlink.ways import WAYS
from dare_agg.errors import (
    REASONS,
    ApartError,
    BaseMismatchError,
    ConfigError,
    DareError,
    UpdateError,
)
from dare_agg.flower.fields import (
    Record,
    flag,
    number,
    raw,
    read_fields,
    said,
    text,
    texts,
    whole,
    words_of,
)
from dare_agg.flower.internals import LOST
from dare_agg.flower.transport import unpack
from dare_agg.flower.workers import WORKER_DIED
from dare_agg.rounds.plan import RoundPlan, plan_from_record
from dare_agg.rounds.same_code import check_same_code, package_fingerprint

# Every record of this library begins so; all others are the app's.
OURS = "dare."
ORDER_KEY = OURS + "order"
REPLY_KEY = OURS + "reply"
UPDATE_KEY = OURS + "update"
DENSE_KEY = OURS + "dense"
STATISTICS_KEY = OURS + "statistics"
DOWN_PREFIX = OURS + "down."

ASK_HELLO = "hello"
ASK_TRAIN = "train"
ASK_EVALUATE = "evaluate"
# To take a piece of the run's base (`dare_agg.flower.base_pieces`).
ASK_BASE = "base"
ASKS = (ASK_HELLO, ASK_TRAIN, ASK_EVALUATE, ASK_BASE)

MAX_DOWN_BYTES = 1 << 40
VERSION = "[0-9a-f]{1,64}"
_NAME = r"[\w.:@ -]{1,64}"
_PLAN_BYTES = 16

# Around what an app's exception said: as Flower's processes send it, and, at the end of a
# traceback, as its simulation does.
_SENT = re.compile(r"<class '([^']+)'>:<'(.*)'>", re.DOTALL)
_SIMULATED = "Exception ClientAppException occurred. Message: "

# What mods of Flower's fail with where they have no place → the way out.
_KNOWN_FAILURES = {
    "secaggplus_configs": "Flower's SecAgg mods take part in its own workflow alone: leave them "
    "out, and sum in secret with SecureStrategy and secure_mod",
    "fitins.parameters": "mods of flwr.client.mod are for Flower's older messages: import them "
    "from flwr.clientapp.mod",
}

Answer = TypeVar("Answer", bound="Record")


@dataclass(frozen=True, kw_only=True)
class SameCode(Record):
    """What both ends compare before anything else is read."""

    codec: int = said(CODEC_VERSION)
    package: str = said(make=lambda: package_fingerprint())

    @classmethod
    def check_sender(cls, record: Mapping[str, Any], theirs: str, ours: str) -> None:
        """Raise `UpdateError` (reason "version" or "package") where the sender's code is other."""
        words = words_of(SameCode)
        codec, package = record.get(words["codec"]), record.get(words["package"])
        check_same_code(codec, package, theirs, ours)


@dataclass(frozen=True, kw_only=True)
class Order(SameCode):
    """What is asked of a client, of which version of the model, and how that comes to it.

    ``downlink`` is a row of `dare_agg.downlink.ways.WAYS`, ``facts`` what that says of versions;
    ``dense``, ``exclude``, ``by_form`` and ``apart`` say the model's groups. To train, ``plan``
    says the rest; a secure sum says it in its own record.
    """

    ask: str = text()
    downlink: str = text(_NAME)
    version: str = text(VERSION, "")
    arrays_key: str = text()
    dense: tuple[str, ...] = texts()
    exclude: tuple[str, ...] = texts()
    by_form: bool = flag()
    apart: tuple[str, ...] = texts()
    facts: Mapping[str, str] = field(default_factory=dict)
    plan: RoundPlan | None = None

    def to_record(self) -> ConfigRecord:
        plan = {} if self.plan is None else self.plan.to_record()
        return ConfigRecord({**plan, **super().to_record(), **self.facts})

    @classmethod
    def read(cls, record: Mapping[str, Any], *, planned: bool = True) -> Self:
        """Read an order; ``planned`` orders to train must hold a plan.

        Raises `UpdateError` (an unknown ask or other code first, then what is malformed),
        `ConfigError` for a downlink that this client does not know.
        """
        ask = record.get(words_of(cls)["ask"])
        if ask not in ASKS:
            raise UpdateError(f"order {one_line(ask)!r} is unknown", reason="version")
        cls.check_sender(record, "server", "this client")
        found = read_fields(cls, record, lambda what: UpdateError(f"order: {what}"))
        way = WAYS.get(found["downlink"])
        if way is None:
            raise ConfigError(
                f"downlink {one_line(found['downlink'])!r} is unknown to this client; known: "
                f"{', '.join(sorted(WAYS))}"
            )
        facts = {word: one_line(record[word]) for word in way.facts if word in record}
        plan = plan_from_record(record) if planned and ask == ASK_TRAIN else None
        return cls(**found, facts=facts, plan=plan)


@dataclass(frozen=True, kw_only=True)
class Hello(SameCode):
    """What a client says of itself before its first round.

    ``name`` orders clients the same way in every run; ``have`` is the version it holds;
    ``uplink_kbit_s`` is 0 where the node does not state it.
    """

    name: str = text(_NAME, "")
    have: str = text(VERSION, "")
    uplink_kbit_s: float = number(0.0, least=0, below=1e12)

    def order(self) -> tuple[int, int, str]:
        """Numbers before names, numbers by value."""
        if self.name.isdecimal():
            return (0, int(self.name), self.name)
        return (1, 0, self.name)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """Read a hello; raises `UpdateError` for other code, and leaves out what is malformed."""
        cls.check_sender(record, "the client", "this server")
        return cls(**read_fields(cls, record))


@dataclass(frozen=True, kw_only=True)
class Receipt(SameCode):
    """What a client says of the update beside it.

    ``plan`` begins the digest of the plan it answers, ``have`` is the version it holds,
    ``statistics`` names the statistics sent along, ``arrays_key`` what the app returned its
    arrays under, where that is not the key they came under.
    """

    round: int = whole(-1)
    plan: bytes = raw(_PLAN_BYTES, b"")
    have: str = text(VERSION, "")
    delta_norm: float = number(math.nan)
    delta_max: float = number(math.nan)
    share_above: float = number(math.nan)
    statistics: tuple[str, ...] = texts()
    arrays_key: str = text(default="")
    signature: bytes = raw(64, b"")

    @classmethod
    def of(cls, plan: RoundPlan, **said: Any) -> Self:
        """The receipt of an answer to ``plan``."""
        return cls(round=plan.round, plan=plan.digest()[:_PLAN_BYTES], **said)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """Read a receipt; raises `UpdateError` for other code. What is malformed is absent."""
        cls.check_sender(record, "the client", "this server")
        return cls(**read_fields(cls, record))

    def check_answers(self, plan: RoundPlan) -> None:
        """Raise `UpdateError` (reason "round" or "plan") for the answer to another plan."""
        if self.round != plan.round:
            raise UpdateError(
                f"the reply is of round {self.round}, this is round {plan.round}", reason="round"
            )
        if self.plan != plan.digest()[:_PLAN_BYTES]:
            raise UpdateError("the reply answers another plan than this client's", reason="plan")


@dataclass(frozen=True, kw_only=True)
class Held(Record):
    """The version a client holds after an evaluation."""

    have: str = text(VERSION, "")

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """Read the version; a malformed one counts as none."""
        return cls(**read_fields(cls, record))


@dataclass(frozen=True, kw_only=True)
class Refusal(Record):
    """Why a client does not do what it was asked: a row of `dare_agg.errors.REASONS`.

    ``lost`` says that it cannot make the version from what it was sent, and from ``have`` could;
    ``apart`` names tied tensors that its training moved apart.
    """

    reason: str = text(word="refused")
    detail: str = text(default="")
    lost: bool = flag()
    have: str = text(VERSION, "")
    apart: tuple[str, ...] = texts()

    @classmethod
    def of(cls, error: DareError, have: str = "") -> Self:
        """The refusal that an error becomes, of a client that holds ``have``."""
        lost = isinstance(error, BaseMismatchError)
        held = have if lost else ""
        apart = error.names if isinstance(error, ApartError) else ()
        return cls(reason=error.reason, detail=one_line(error), lost=lost, have=held, apart=apart)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self | None:
        """Read a refusal, None where the record is none; unknown reasons become "refused"."""
        if words_of(cls)["reason"] not in record:
            return None
        found = {"detail": "", **read_fields(cls, record)}
        if found.get("reason") not in REASONS:
            found["reason"] = "refused"
        return cls(**{**found, "detail": one_line(found["detail"])})


def read_answer(
    content: RecordDict, kind: type[Answer], key: str = REPLY_KEY
) -> Answer | Refusal | None:
    """Read a client's record as ``kind`` or as a refusal; None where there is none."""
    record = read_config(content, key)
    if record is None:
        return None
    return Refusal.read(record) or kind.read(record)  # type: ignore[attr-defined,no-any-return]


def is_order(message: Message) -> bool:
    """Whether a message asks something of a client; no reply does, whatever a client puts there.

    What Flower's mods answer to a reply of their own names no message that it replies to.
    """
    return bool(message.has_content()) and ORDER_KEY in message.content


def read_refusal(message: Message, key: str = REPLY_KEY) -> Refusal | None:
    """The refusal that a message holds, None where it is none."""
    record = None if message.has_error() else read_config(message.content, key)
    return None if record is None else Refusal.read(record)


def one_line(text: object, limit: int = 300) -> str:
    """Return text that is safe to log: printable, one line, short."""
    flat = " ".join(str(text).split())
    printable = "".join(ch if ch.isprintable() else "?" for ch in flat)
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


class Unread(Error):
    """Why a reply was not taken, in place of its content; made here, and never sent."""

    def __init__(self, error: DareError) -> None:
        super().__init__(code=0, reason=one_line(error))
        self.why = error.reason


def unread(error: DareError, sent: Message) -> Message:
    """What stands for the reply to ``sent`` that was not taken."""
    return Message(Unread(error), reply_to=sent)


def failure_of(message: Message) -> tuple[str, str]:
    """The reason of a failed message, and its error in one line."""
    if isinstance(message.error, Unread):
        return message.error.why, message.error.reason or ""
    said = said_by(message)
    if worker_died(message):
        return "worker", WORKER_DIED
    reason = "lost" if message.error.code in LOST else "client-error"
    return reason, f"Flower error code {message.error.code}: {said}{way_out(message)}"


def said_by(message: Message) -> str:
    """What the exception behind a failed message said, in one line, without Flower's wrapping."""
    kind, text = "", (message.error.reason or "").strip()
    if found := _SENT.fullmatch(text):
        kind, text = found[1].rpartition(".")[2], found[2]
    if _SIMULATED in text:  # which keeps the words of an exception alone
        text = text.rpartition(_SIMULATED)[2]
    elif text.startswith("Traceback") or not kind:  # the exception is the last line
        text = (text.splitlines() or [""])[-1]
    else:
        text = f"{kind}: {text}"
    return one_line(text) or "no text"


def way_out(message: Message) -> str:
    """What to do about a failure that a mod of Flower's is known for, "" for another."""
    said = message.error.reason or ""
    return next((f"; {way}" for word, way in _KNOWN_FAILURES.items() if word in said), "")


def worker_died(message: Message) -> bool:
    """Whether a message failed because the process that it was given to died."""
    return message.has_error() and WORKER_DIED in (message.error.reason or "")


def read_payload(content: RecordDict, key: str, limit: int) -> bytes | None:
    """Return the payload under ``key`` (None if absent); `UpdateError` as `unpack` raises."""
    record = content.get(key)
    if record is None:
        return None
    if not isinstance(record, ArrayRecord):
        raise UpdateError(
            f"{key!r} is a {type(record).__name__}, an ArrayRecord is needed", reason="transport"
        )
    return unpack(record, limit)


def read_config(content: RecordDict, key: str) -> ConfigRecord | None:
    """Return the ConfigRecord under ``key``, None if there is none."""
    record = content.get(key)
    return record if isinstance(record, ConfigRecord) else None


def metrics_of(content: RecordDict) -> dict[str, object]:
    """Return all numbers of a message's MetricRecords as plain values, to be signed."""
    return {key: dict(record.items()) for key, record in content.metric_records.items()}


def down_payloads(content: RecordDict) -> dict[str, bytes]:
    """Return the downlink's payloads by name."""
    return {
        key.removeprefix(DOWN_PREFIX): unpack(record, MAX_DOWN_BYTES)
        for key, record in content.items()
        if key.startswith(DOWN_PREFIX) and isinstance(record, ArrayRecord)
    }
