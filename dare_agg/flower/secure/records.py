"""The records of secure sums inside Flower's messages, and who a node is.

To a party: ``dare.secure`` (stage, session, terms, patterns) and, from the second stage on,
the protocol's message as ``dare.secure.message``. Back: the same two, or a refusal.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from dare_agg.codec.update import CODEC_VERSION
from dare_agg.errors import ProtocolError
from dare_agg.flower.records import read_payload
from dare_agg.flower.transport import pack
from dare_agg.rounds.same_code import check_same_code, package_fingerprint
from dare_agg.vectors.model import ModelRef

SECURE_KEY = "dare.secure"
MESSAGE_KEY = "dare.secure.message"
QUERY = "secure"

HELLO, TRAIN, ADVERTISE, RESULT = "hello", "train", "advertise", "result"


def secure_content(
    stage: str, session: bytes = b"", message: bytes | None = None, /, **more: Any
) -> RecordDict:
    """Make the records of one request or answer."""
    record = ConfigRecord(
        {
            "stage": stage,
            "session": session,
            "codec": CODEC_VERSION,
            "package": package_fingerprint(),
            **more,
        }
    )
    content = RecordDict({SECURE_KEY: record})
    if message is not None:
        content[MESSAGE_KEY] = pack(message)
    return content


def read_message(content: RecordDict, limit: int) -> bytes:
    """Return the protocol's message; raises `ProtocolError` where there is none."""
    found = read_payload(content, MESSAGE_KEY, limit)
    if found is None:
        raise ProtocolError("the record holds no message of the protocol", reason="malformed")
    return found


def read_bytes(record: ConfigRecord, key: str, length: int | None = None) -> bytes:
    """The bytes under ``key``, of ``length`` where given; else `ProtocolError` "malformed"."""
    value = record.get(key)
    if not isinstance(value, bytes) or (length is not None and len(value) != length):
        raise ProtocolError(f"{key!r} is missing or of another form", reason="malformed")
    return value


def read_words(record: ConfigRecord, key: str) -> tuple[str, ...]:
    """The texts under ``key``; none where it is absent or no list."""
    value = record.get(key, [])
    return tuple(str(item) for item in value) if isinstance(value, list) else ()


def same_code(record: ConfigRecord, theirs: str, ours: str) -> None:
    """Raise `ProtocolError` unless both ends run the same codec and package."""
    check_same_code(record.get("codec"), record.get("package"), theirs, ours)


def names_of(ref: ModelRef) -> tuple[str, str]:
    """Base and layout, as the terms name them: of both parts where there is a dense one."""
    if not ref.dense_size:
        return ref.base, ref.layout
    both = hashlib.sha256(f"{ref.layout} {ref.dense_layout}".encode()).hexdigest()
    return ref.version, both


def hello_input(challenge: bytes, node: int) -> bytes:
    """What a node signs to say which party it is: fresh, and of no use to another node."""
    return b"dare-agg secure hello 1\0" + challenge + struct.pack("<Q", node % (1 << 64))
