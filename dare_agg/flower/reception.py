"""What a client receives: its half of the downlink, opened once a message."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from dare_agg.downlink.protocol import Receiver
from dare_agg.downlink.ways import WAYS, Place
from dare_agg.files.cache import cache_folder
from dare_agg.flower.records import Order, down_payloads
from dare_agg.flower.transport import SentArrays, to_record
from dare_agg.vectors.model import Arrays

LOG = logging.getLogger("flwr")

BaseOffer = Callable[[Message, Context], Arrays]
_OFFERS: list[BaseOffer] = []


def offer_base(function: BaseOffer) -> BaseOffer:
    """Register how this client makes the base of a run from public parts by itself.

    ``function(message, context)`` returns named arrays; the message holds the app's config.
    Arrays with another fingerprint than the run's base are ignored, and the server sends it.
    """
    _OFFERS.append(function)
    return function


def client_name(context: Context) -> str:
    """What the node config calls this client, "" for nothing."""
    node = context.node_config
    return str(node.get("client-name", node.get("partition-id", "")))


def open_receiver(order: Order, context: Context) -> Receiver:
    """The receiver of the downlink that the order names; raises as it does."""
    place = Place(
        _folder(context),
        client_name(context) or str(context.node_id),
        order.dense,
        order.exclude,
        order.by_form,
        order.apart,
    )
    return WAYS[order.downlink].receive(place, order.facts)


def _folder(context: Context) -> Path:
    """Where versions are kept: for parties of secure sums, apart for each roster.

    One consortium's server shall not learn what another's had this party keep, nor change it.
    """
    node = context.node_config
    root = Path(str(node["cache"])) if "cache" in node else cache_folder("versions")
    if "secure-identity" not in node:
        return root
    who = f"{node['secure-identity']}\0{node.get('secure-roster', '')}"
    return root / "parties" / hashlib.sha256(who.encode()).hexdigest()[:16]


def offered_bases(msg: Message, context: Context) -> Iterator[Arrays]:
    """What the registered functions make of the base, one after another; failures are logged."""
    for offer in _OFFERS:
        try:
            yield offer(msg, context)
        except Exception as error:  # the server's copy still serves
            LOG.warning("no base from this client: %s: %s", type(error).__name__, error)


def look_for_base(msg: Message, receiver: Receiver, context: Context) -> None:
    """Spare the way of the base where this client has it or can make it."""
    if not receiver.wants_base():
        return
    for arrays in offered_bases(msg, context):
        try:
            if receiver.adopt(arrays):
                return
        except Exception as error:  # another base than the run's
            LOG.warning("no base from this client: %s: %s", type(error).__name__, error)


def receive_base(content: RecordDict, order: Order, receiver: Receiver) -> dict[str, Array]:
    """Return the asked version's full arrays, still serialised where they came so.

    Raises `BaseMismatchError` where the receiver cannot make it.
    """
    record = content.get(order.arrays_key)
    sent = SentArrays(record) if isinstance(record, ArrayRecord) else None
    arrays = receiver.receive(order.version, down_payloads(content), sent)
    return dict((sent.record if arrays is sent else to_record(arrays)).items())
