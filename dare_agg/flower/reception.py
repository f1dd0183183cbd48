"""What a client receives: its half of the downlink, opened once a message."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from dare_agg.checkpoint import open_checkpoint
from dare_agg.checkpoint.hub import located
from dare_agg.checkpoint.model import read_tensor
from dare_agg.downlink.base import CHAIN_NAME
from dare_agg.downlink.protocol import Receiver
from dare_agg.downlink.ways import WAYS, Place
from dare_agg.errors import BaseMissingError
from dare_agg.files.cache import cache_folder
from dare_agg.flower.bases import Offer, find_base, missing
from dare_agg.flower.lazy import record_of
from dare_agg.flower.records import down_payloads
from dare_agg.flower.transport import SentArrays, to_record
from dare_agg.rounds.messages import Order
from dare_agg.vectors.model import Arrays

LOG = logging.getLogger("flwr")

BaseOffer = Callable[[Message, Context], Offer]
_OFFERS: list[BaseOffer] = []


def offer_base(function: BaseOffer) -> BaseOffer:
    """Register how this client makes the base of a run from public parts by itself.

    ``function(message, context)`` returns named arrays, or the file or folder where they lie;
    the message holds the app's config. One with another fingerprint than the run's base is
    ignored, and the server sends it, or says what to put where.
    """
    _OFFERS.append(function)
    return function


def client_name(context: Context) -> str:
    """What the node config calls this client, "" for nothing."""
    node = context.node_config
    return str(node.get("client-name", node.get("partition-id", "")))


def open_receiver(order: Order, context: Context, msg: Message | None = None) -> Receiver:
    """The receiver of the downlink that the order names; raises as it does.

    Of a run whose base lies on disk, the client's own is looked for; with ``msg`` its app is
    asked for it too. Raises `BaseMissingError` where it has none, and is not sent it.
    """
    folder = folder_of(context)
    base = None
    if order.downlink == CHAIN_NAME:
        base = find_base(
            order, context, folder, lambda: iter(()) if msg is None else _offered(msg, context)
        )
    place = Place(
        folder,
        client_name(context) or str(context.node_id),
        order.dense,
        order.exclude,
        order.by_form,
        order.apart,
        base,
    )
    return WAYS[order.downlink].receive(place, order.facts)


def folder_of(context: Context) -> Path:
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
    for offered in _offered(msg, context):
        yield _read(located(offered)) if isinstance(offered, str | os.PathLike) else offered


def _offered(msg: Message, context: Context) -> Iterator[Offer]:
    for offer in _OFFERS:
        try:
            yield offer(msg, context)
        except Exception as error:  # the server's copy still serves
            LOG.warning("no base from this client: %s: %s", type(error).__name__, error)


def _read(place: Path) -> Arrays:
    checkpoint = open_checkpoint(place)
    return {name: read_tensor(checkpoint, name) for name in checkpoint.names}


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

    Those of a version on disk are read when they are looked at. Raises `BaseMismatchError` where
    the receiver cannot make it, `BaseMissingError` where the client has not the run's base.
    """
    if order.downlink == CHAIN_NAME and receiver.wants_base():
        raise BaseMissingError(missing(order, ()))
    record = content.get(order.arrays_key)
    sent = SentArrays(record) if isinstance(record, ArrayRecord) else None
    arrays = receiver.receive(order.version, down_payloads(content), sent)
    model = receiver.followed()
    if model is not None:
        return dict(record_of(model).items())
    return dict((sent.record if arrays is sent else to_record(arrays)).items())
