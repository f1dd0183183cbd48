"""The client mod: full arrays in front of it, a compact update behind it.

``ClientApp(mods=[dare_mod])`` is the whole change in an app. The training code gets ordinary
arrays under the key it knows and returns ordinary arrays; the mod forms the delta, drops,
quantises and sends. Messages of other strategies (FedAvg) pass through untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray

from dare_agg.codec.update import CODEC_VERSION
from dare_agg.deploy.identities import load_identity
from dare_agg.downlink.base import DOWNLINK_NAME
from dare_agg.downlink.client import VersionReceiver
from dare_agg.downlink.protocol import FullReceiver, Receiver
from dare_agg.errors import (
    BaseMismatchError,
    ConfigError,
    DareError,
    LayoutError,
    UpdateError,
)
from dare_agg.files.cache import cache_folder
from dare_agg.flower.internals import ClientAppCallable
from dare_agg.flower.records import (
    ASK_EVALUATE,
    ASK_HELLO,
    ASK_TRAIN,
    DENSE_KEY,
    DOWN_PREFIX,
    ORDER_KEY,
    REPLY_KEY,
    STATISTICS_KEY,
    UPDATE_KEY,
    down_payloads,
    metrics_of,
    one_line,
    read_config,
)
from dare_agg.flower.transport import pack, to_numpy, to_record
from dare_agg.rounds.client import ClientUpdate, make_client_update
from dare_agg.rounds.plan import RoundPlan, plan_from_record
from dare_agg.rounds.same_code import check_same_code, package_fingerprint
from dare_agg.rounds.signing import reply_digest
from dare_agg.vectors.model import Arrays, split_tensors
from dare_agg.vectors.patterns import compile_patterns, matches

LOG = logging.getLogger("flwr")
LOCAL_KEY = "dare.local"

BaseOffer = Callable[[Message, Context], Arrays]
_OFFERS: list[BaseOffer] = []


def offer_base(function: BaseOffer) -> BaseOffer:
    """Register how this client makes the base of a run from public parts by itself.

    ``function(message, context)`` returns named arrays; the message holds the app's config.
    Arrays with another fingerprint than the run's base are ignored, and the server sends it.
    """
    _OFFERS.append(function)
    return function


def _version_receiver(context: Context, order: ConfigRecord) -> Receiver:
    node = context.node_config
    name = node.get("client-name", node.get("partition-id", context.node_id))
    patterns = {
        key: tuple(str(item) for item in value)
        for key in ("dense", "exclude")
        if isinstance(value := order.get(key), list)
    }
    folder = Path(str(node["cache"])) if "cache" in node else cache_folder("versions")
    return VersionReceiver(
        folder,
        str(name),
        str(order.get("base-version", "")),
        dense=patterns.get("dense", ()),
        exclude=patterns.get("exclude", ()),
    )


# Downlink name → receiver for this client.
RECEIVERS: dict[str, Callable[[Context, ConfigRecord], Receiver]] = {
    "full": lambda context, order: FullReceiver(),
    DOWNLINK_NAME: _version_receiver,
}


def dare_mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
    """Flower client mod; see the module's text.

    A plan this client cannot or must not follow (other package, other base, non-finite
    result, …) is answered with a typed refusal, never with a wrong update. Exceptions of the
    training code go to Flower as they are.
    """
    order = read_config(msg.content, ORDER_KEY)
    if order is None:
        return call_next(msg, ctxt)
    try:
        ask = order.get("ask")
        if ask == ASK_HELLO:
            _look_for_base(msg, order, ctxt)
            return Message(RecordDict({REPLY_KEY: _hello(order, ctxt)}), reply_to=msg)
        if ask not in (ASK_TRAIN, ASK_EVALUATE):
            raise UpdateError(f"order {one_line(ask)!r} is unknown", reason="version")
        _check_same_code(order)
        plan = plan_from_record(order) if ask == ASK_TRAIN else None
        base = receive_base(msg.content, order, ctxt)
        msg.content = _content_for_app(msg.content, order, base, ctxt)
    except DareError as error:
        return _refuse(msg, error, order, ctxt)
    held = dict(base)  # training code may empty the record it is handed
    reply = call_next(msg, ctxt)
    if reply.has_error():
        return reply
    try:
        if plan is not None:
            reply.content = _content_for_server(reply.content, order, plan, held, ctxt)
        else:
            reply.content[REPLY_KEY] = ConfigRecord(
                {"have": receiver_of(order, ctxt).have() or "-"}
            )
    except DareError as error:
        return _refuse(msg, error, order, ctxt)
    return reply


def _look_for_base(msg: Message, order: ConfigRecord, context: Context) -> None:
    """Spare the way of the base where this client has it or can make it."""
    _check_same_code(order)
    receiver = receiver_of(order, context)
    if not isinstance(receiver, VersionReceiver) or receiver.have():
        return
    for offer in _OFFERS:
        try:
            if receiver.adopt(offer(msg, context)):
                return
        except Exception as error:  # the server's copy still serves
            LOG.warning("no base from this client: %s: %s", type(error).__name__, error)


def _hello(order: ConfigRecord, context: Context) -> ConfigRecord:
    """Say who this client is; refuses another codec or package before anything trains."""
    _check_same_code(order)
    hello = ConfigRecord({"package": package_fingerprint(), "codec": CODEC_VERSION})
    name = context.node_config.get("client-name", context.node_config.get("partition-id"))
    if name is not None:
        hello["name"] = str(name)
    uplink = context.node_config.get("uplink-kbit-s")
    if uplink is not None:
        hello["uplink-kbit-s"] = float(uplink)
    have = receiver_of(order, context).have()
    if have:
        hello["have"] = have
    return hello


def _check_same_code(order: ConfigRecord) -> None:
    check_same_code(order.get("codec"), order.get("package"), "server", "this client")


def receiver_of(order: ConfigRecord, context: Context) -> Receiver:
    """The receiver of the downlink that the order names."""
    name = str(order.get("downlink", "full"))
    if name not in RECEIVERS:
        raise ConfigError(
            f"downlink {one_line(name)!r} is unknown to this client; known: "
            f"{', '.join(sorted(RECEIVERS))}"
        )
    return RECEIVERS[name](context, order)


def receive_base(content: RecordDict, order: ConfigRecord, context: Context) -> dict[str, Array]:
    """Return the asked version's full arrays, still serialised where they came so."""
    key = str(order.get("arrays-key", "arrays"))
    record = content.get(key)
    receiver = receiver_of(order, context)
    if isinstance(receiver, FullReceiver) and isinstance(record, ArrayRecord):
        return dict(record.items())
    arrays = receiver.receive(
        str(order.get("version", "")),
        down_payloads(content),
        to_numpy(record) if isinstance(record, ArrayRecord) else None,
    )
    return dict(to_record(arrays).items())


def _content_for_app(
    content: RecordDict,
    order: ConfigRecord,
    base: dict[str, Array],
    context: Context,
) -> RecordDict:
    """Return what the app's own code sees: full arrays, with this client's local tensors."""
    arrays = dict(base)
    kept = context.state.get(LOCAL_KEY)
    if isinstance(kept, ArrayRecord):
        arrays.update(kept.items())
    key = str(order.get("arrays-key", "arrays"))
    records = {
        name: record
        for name, record in content.items()
        if name not in (ORDER_KEY, key) and not name.startswith(DOWN_PREFIX)
    }
    return RecordDict({key: ArrayRecord(arrays), **records})


def _content_for_server(
    content: RecordDict,
    order: ConfigRecord,
    plan: RoundPlan,
    base: dict[str, Array],
    context: Context,
) -> RecordDict:
    """Replace the reply's arrays by the update; every other record stays."""
    key = str(order.get("arrays-key", "arrays"))
    found = {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}
    collected = found.pop(STATISTICS_KEY, None)
    if key not in found and len(found) == 1:
        key = next(iter(found))
    if key not in found:
        raise LayoutError(
            f"the training code returned {len(found)} ArrayRecords, none under {key!r}; return "
            f"the trained arrays as RecordDict({{{key!r}: ArrayRecord(...)}})"
        )
    tuned = to_numpy(found[key])
    base_arrays = {name: array.numpy() for name, array in base.items()}
    if plan.terms.statistics and collected is None:
        raise UpdateError(
            f"the server merges by {plan.terms.statistics} values, the training code returned "
            f"none; return them as an ArrayRecord under {STATISTICS_KEY!r}",
            reason="statistics",
        )
    update = make_client_update(
        plan, base_arrays, tuned, None if collected is None else to_numpy(collected)
    )
    _keep_local(plan, base_arrays, tuned, context)
    records: dict[str, ArrayRecord | ConfigRecord] = {
        name: record  # type: ignore[misc]
        for name, record in content.items()
        if name not in (key, STATISTICS_KEY)
    }
    records[UPDATE_KEY] = pack(update.blob)
    if update.dense_blob is not None:
        records[DENSE_KEY] = pack(update.dense_blob)
    receipt = _receipt(plan, update, receiver_of(order, context).have())
    statistics = b""
    if update.statistics is not None:
        statistics = update.statistics.blob
        records[STATISTICS_KEY] = pack(statistics)
        if update.statistics.names:
            receipt["statistics"] = list(update.statistics.names)
    identity = context.node_config.get("identity")
    if identity is not None:
        digest = reply_digest(
            plan.digest(), update.blob, update.dense_blob, metrics_of(content), statistics
        )
        receipt["signature"] = load_identity(str(identity)).sign(digest)
    records[REPLY_KEY] = receipt
    return RecordDict(records)  # type: ignore[arg-type]


def _receipt(plan: RoundPlan, update: ClientUpdate, have: str) -> ConfigRecord:
    return ConfigRecord(
        {
            "codec": CODEC_VERSION,
            "package": package_fingerprint(),
            "round": plan.round,
            "plan": plan.digest()[:16],
            "have": have or "-",
            "delta-norm": update.delta_norm,
            "delta-max": update.delta_max,
            "share-above": update.share_above,
        }
    )


def _keep_local(
    plan: RoundPlan,
    base: dict[str, NDArray[np.generic]],
    tuned: dict[str, NDArray[np.generic]],
    context: Context,
) -> None:
    """Keep this client's own tensors (heads, buffers) for its next round."""
    local = set(split_tensors(base, dense=plan.terms.dense, exclude=plan.terms.exclude).local)
    patterns = compile_patterns(plan.terms.exclude)
    kept = {
        name: array for name, array in tuned.items() if name in local or matches(name, patterns)
    }
    if kept:
        context.state[LOCAL_KEY] = to_record(kept)


def _refuse(msg: Message, error: DareError, order: ConfigRecord, context: Context) -> Message:
    refusal = ConfigRecord({"refused": error.reason, "detail": one_line(error)})
    if error.reason == BaseMismatchError.reason and "base-version" in order:
        refusal["have"] = receiver_of(order, context).have() or "-"
    return Message(RecordDict({REPLY_KEY: refusal}), reply_to=msg)
