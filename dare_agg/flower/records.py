"""What strategy and mod add to Flower's messages (`dare_agg.rounds.messages`), and their failures.

To a client: ``dare.order`` (`Order`) and, where the downlink sends payloads,
``dare.down.<name>``. Back: ``dare.reply`` (`Hello`, `Receipt`, `Held` or `Refusal`) with the
update's payloads ``dare.update``, ``dare.dense`` and ``dare.statistics``. The app's own records
travel beside them untouched.
"""

from __future__ import annotations

import re
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict

from dare_agg.errors import DareError, UpdateError
from dare_agg.flower.internals import LOST
from dare_agg.flower.transport import unpack
from dare_agg.flower.workers import WORKER_DIED
from dare_agg.rounds.fields import Record
from dare_agg.rounds.messages import ORDER_KEY, OURS, REPLY_KEY, Refusal, one_line

UPDATE_KEY = OURS + "update"
DENSE_KEY = OURS + "dense"
STATISTICS_KEY = OURS + "statistics"
DOWN_PREFIX = OURS + "down."

MAX_DOWN_BYTES = 1 << 40

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
