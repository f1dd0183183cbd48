"""The records that strategy and mod add to Flower's messages, and how they are read.

To a client: ``dare.order`` (what is asked, and the round plan) and, where the downlink sends
payloads, ``dare.down.<name>``. Back: ``dare.reply`` with the update's payloads
``dare.update``, ``dare.dense`` and ``dare.statistics``. The app's own records travel beside them
untouched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from dare_agg.errors import UpdateError
from dare_agg.flower.transport import unpack

ORDER_KEY = "dare.order"
REPLY_KEY = "dare.reply"
UPDATE_KEY = "dare.update"
DENSE_KEY = "dare.dense"
STATISTICS_KEY = "dare.statistics"
DOWN_PREFIX = "dare.down."

ASK_HELLO = "hello"
ASK_TRAIN = "train"
ASK_EVALUATE = "evaluate"

MAX_NAME = 64
MAX_DOWN_BYTES = 1 << 40
_SLUG = re.compile(r"[a-z][a-z-]{0,31}")
_NAME = re.compile(r"[\w.:@ -]{1,64}")


@dataclass(frozen=True)
class Hello:
    """What a client says of itself before its first round.

    ``name`` orders clients the same way in every run; ``have`` is the version it holds;
    ``uplink_kbit_s`` is 0 where the node does not state it.
    """

    name: str
    have: str = ""
    uplink_kbit_s: float = 0.0

    def order(self) -> tuple[int, int, str]:
        """Numbers before names, numbers by value."""
        if self.name.isdecimal():
            return (0, int(self.name), self.name)
        return (1, 0, self.name)


def read_hello(record: ConfigRecord, node: int) -> Hello:
    """Read a hello; a client without a name of its own goes by its node id."""
    name = _text(record, "name", _NAME) or str(node)
    uplink = record.get("uplink-kbit-s", 0.0)
    if isinstance(uplink, bool) or not isinstance(uplink, int | float) or not 0 <= uplink < 1e12:
        uplink = 0.0
    return Hello(name, _text(record, "have", re.compile(r"[0-9a-f]{1,64}")), float(uplink))


def read_have(record: ConfigRecord) -> str:
    """Return the version a client says it holds, "" for none."""
    return _text(record, "have", re.compile(r"[0-9a-f]{1,64}"))


def read_refusal(record: ConfigRecord) -> tuple[str, str] | None:
    """Return ``(reason, detail)`` when the client refused, else None."""
    reason = record.get("refused")
    if reason is None:
        return None
    slug = reason if isinstance(reason, str) and _SLUG.fullmatch(reason) else "refused"
    return slug, one_line(record.get("detail", ""))


def one_line(text: object, limit: int = 300) -> str:
    """Return text that is safe to log: printable, one line, short."""
    flat = " ".join(str(text).split())
    printable = "".join(ch if ch.isprintable() else "?" for ch in flat)
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


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


def _text(record: Mapping[str, object], key: str, pattern: re.Pattern[str]) -> str:
    value = record.get(key, "")
    return value if isinstance(value, str) and pattern.fullmatch(value) else ""
