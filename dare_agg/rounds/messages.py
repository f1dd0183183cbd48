"""What server and clients of a round say to each other, as frozen classes.

An `Order` goes to a client, beside the payloads of the downlink; back come a `Hello`, a `Receipt`
beside the update's payloads, `Held` or a `Refusal`. How a record and its payloads travel is the
engine's matter; nothing in one is trusted when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

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
from dare_agg.rounds.fields import (
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
from dare_agg.rounds.plan import RoundPlan, plan_from_record
from dare_agg.rounds.same_code import check_same_code, package_fingerprint

# Every record of this library begins so; all others are the app's.
OURS = "dare."
ORDER_KEY = OURS + "order"
REPLY_KEY = OURS + "reply"

ASK_HELLO = "hello"
ASK_TRAIN = "train"
ASK_EVALUATE = "evaluate"
# To take a piece of the run's base.
ASK_BASE = "base"
ASKS = (ASK_HELLO, ASK_TRAIN, ASK_EVALUATE, ASK_BASE)

VERSION = "[0-9a-f]{1,64}"
_NAME = r"[\w.:@ -]{1,64}"
_PLAN_BYTES = 16


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
    says the rest; a secure sum says it in its own record. ``not_merged`` is why the client's last
    update did not count, where nobody waits for it to be told.
    """

    ask: str = text()
    downlink: str = text(_NAME)
    version: str = text(VERSION, "")
    arrays_key: str = text()
    dense: tuple[str, ...] = texts()
    exclude: tuple[str, ...] = texts()
    by_form: bool = flag()
    apart: tuple[str, ...] = texts()
    not_merged: str = text(default="")
    facts: Mapping[str, str] = field(default_factory=dict)
    plan: RoundPlan | None = None

    def to_record(self) -> dict[str, Any]:
        plan = {} if self.plan is None else self.plan.to_record()
        return {**plan, **super().to_record(), **self.facts}

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


def one_line(text: object, limit: int = 300) -> str:
    """Return text that is safe to log: printable, one line, short."""
    flat = " ".join(str(text).split())
    printable = "".join(ch if ch.isprintable() else "?" for ch in flat)
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"
