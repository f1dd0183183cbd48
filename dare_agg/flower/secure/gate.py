"""What a party of secure sums answers at all, and what its answers may say of itself.

A node with a ``secure-identity`` answers two kinds of messages: who it is, and the protocol.
Everything else is refused before any of the app's code runs, whatever the message, the run
config or the app's own queries are. A refusal says one of the protocol's reasons in fixed words;
paths, values and exceptions stay in this machine's log.
"""

from __future__ import annotations

import logging

from flwr.app import ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict

from dare_agg.downlink.protocol import Receiver
from dare_agg.errors import REASONS, BaseMismatchError, DareError
from dare_agg.flower.internals import FailureCode
from dare_agg.flower.records import ORDER_KEY, REPLY_KEY, read_config, read_refusal
from dare_agg.flower.secure.records import (
    MESSAGE_KEY,
    QUERY,
    SECURE_KEY,
    TRAIN,
    content_of,
    stage_of,
)
from dare_agg.rounds.fields import words_of
from dare_agg.rounds.messages import ASK_HELLO, Order, Refusal

LOG = logging.getLogger("flwr")

# Reasons that follow from the messages and the signed terms alone: a server may be told.
TOLD = frozenset(
    (
        "version", "package", "malformed", "truncated", "transport", "oversized", "signature",
        "base", "layout", "terms", "roster", "aggregate", "clip", "parties", "groups",
        "threshold", "degree", "norm", "training", "local", "stage", "session", "cohort",
        "own-keys", "low-order", "shares", "nonce", "overlap", "alive", "duplicate",
        "second-cohort", "shape", "privacy",
    )
)  # fmt: skip
TURNED_AWAY = "this node takes part in secure sums only: refused"
# Behind it a metric's name has what it is of: a label, a group, and so this node's own words.
_OF_A_PART = ":"
KEPT_HERE = "this party does not take part; its own log says why"


def is_guarded(context: Context) -> bool:
    """Whether this node takes part in secure sums only."""
    node = context.node_config
    return "secure-identity" in node and node.get("secure-only") is not False


def is_asked_well(message: Message, context: Context) -> bool:
    """Whether a guarded node answers this message: who it is, the protocol, and metrics where
    its own config has ``secure-evaluate``."""
    kind, content = message.metadata.message_type, message.content
    if kind == f"{MessageType.QUERY}.{QUERY}":
        # Whatever else lay there, another mod or the app might answer.
        return set(content) <= {SECURE_KEY, MESSAGE_KEY}
    secure, order = read_config(content, SECURE_KEY), read_config(content, ORDER_KEY)
    ask = None if order is None else order.get(words_of(Order)["ask"])
    if kind == MessageType.TRAIN:
        # A hello has an empty record where other messages have the model.
        says_hello = ask == ASK_HELLO and not any(content.array_records.values())
        return says_hello or (secure is not None and stage_of(secure) == TRAIN)
    return kind == MessageType.EVALUATE and context.node_config.get("secure-evaluate") is True


def turned_away(message: Message) -> Message:
    """The one answer to everything else."""
    LOG.warning(
        "this node takes part in secure sums only; a message of type %r was refused "
        "(secure-evaluate=true in its node config would let it report metrics, secure-only=false "
        "would let it take part in the clear)",
        str(message.metadata.message_type)[:40],
    )
    return Message(Error(FailureCode.APP_RAISED, TURNED_AWAY), reply_to=message)


def in_fixed_words(reply: Message, asked: Message) -> Message:
    """An answer to a hello or an evaluation: our own record and numbers, and nothing beside.

    Numbers of all the rows: metrics by label (``loss:LABEL``) have names of the data's own.
    """
    if reply.has_error():
        LOG.warning("secure party: %s", reply.error.reason)
        return Message(Error(FailureCode.APP_RAISED, KEPT_HERE), reply_to=asked)
    content = RecordDict()
    for name, record in reply.content.metric_records.items():
        numbers = {key: value for key, value in record.items() if _OF_A_PART not in key}
        content[name] = MetricRecord(numbers)
    own, refusal = read_config(reply.content, REPLY_KEY), read_refusal(reply)
    if refusal is not None:
        LOG.warning("secure party: %s: %s", refusal.reason, refusal.detail)
        own = ConfigRecord(_fixed(refusal.reason, refusal.lost, refusal.have).to_record())
    if own is not None:
        content[REPLY_KEY] = own
    return Message(content, reply_to=asked)


def refusal_of(
    error: Exception, context: Context, stage: str, receiver: Receiver | None = None
) -> RecordDict:
    """The refusal that an error becomes.

    The whole of it goes into this machine's log. A guarded node tells the reason's own words,
    where it may be told at all.
    """
    known = error if isinstance(error, DareError) else None
    LOG.warning("secure sum, stage %s: %s", stage, error, exc_info=None if known else error)
    have = receiver.have() if receiver else ""
    if not is_guarded(context):
        told = known or DareError(f"{type(error).__name__}: {error}", reason="client-error")
        return content_of(Refusal.of(told, have))
    lost = isinstance(error, BaseMismatchError)
    return content_of(_fixed("" if known is None else known.reason, lost, have if lost else ""))


def _fixed(reason: str, lost: bool = False, have: str = "") -> Refusal:
    if reason not in TOLD:
        return Refusal(reason="refused", detail=KEPT_HERE)
    return Refusal(reason=reason, detail=REASONS[reason], lost=lost, have=have)
