"""The client mod: full arrays in front of it, a compact update behind it.

``ClientApp(mods=[dare_mod])`` is the whole change in an app. The training code gets ordinary
arrays under the key it knows and returns ordinary arrays; the mod forms the delta, drops,
quantises and sends. Messages of other strategies (FedAvg) pass through untouched.
"""

from __future__ import annotations

import functools
import logging

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)

from dare_agg.deploy.identities import load_identity
from dare_agg.downlink.protocol import Receiver
from dare_agg.errors import BaseMismatchError, DareError, UpdateError
from dare_agg.flower.app_records import (
    changed_integers,
    content_for_app,
    keep_local,
    kept_local,
    trained_record,
    without_model,
)
from dare_agg.flower.internals import ClientAppCallable
from dare_agg.flower.reception import client_name, look_for_base, open_receiver, receive_base
from dare_agg.flower.records import (
    ASK_HELLO,
    DENSE_KEY,
    ORDER_KEY,
    REPLY_KEY,
    STATISTICS_KEY,
    UPDATE_KEY,
    Held,
    Hello,
    Order,
    Receipt,
    Refusal,
    metrics_of,
    read_config,
)
from dare_agg.flower.transport import pack, to_numpy
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.signing import reply_digest
from dare_agg.vectors.model import split_tensors
from dare_agg.vectors.returned import in_shape_of, returned_tensors

LOG = logging.getLogger("flwr")
_CHANGED = BaseMismatchError(
    "the arrays that reached dare_mod are not those that the server sent: a mod in front of it "
    "changed them; put it behind: ClientApp(mods=[dare_mod, other_mod])"
)


def dare_mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
    """Flower client mod; see the module's text.

    A plan this client cannot or must not follow (other package, other base, non-finite
    result, …) is answered with a typed refusal, never with a wrong update. Exceptions of the
    training code go to Flower as they are.
    """
    record = read_config(msg.content, ORDER_KEY)
    if record is None:
        return call_next(msg, ctxt)
    receiver: Receiver | None = None
    came_whole = False
    try:
        order = Order.read(record)
        receiver = open_receiver(order, ctxt)
        if order.ask == ASK_HELLO:
            look_for_base(msg, receiver, ctxt)
            return _answer(msg, _hello(receiver, ctxt), MetricRecord())
        base = receive_base(msg.content, order, receiver)
        arrays = {**base, **kept_local(ctxt)}
        came_whole = order.arrays_key in msg.content
        msg.content = content_for_app(msg.content, order.arrays_key, arrays)
    except DareError as error:
        return _answer(msg, _refusal(error, receiver))
    held = dict(base)  # training code may empty the record it is handed
    reply = call_next(msg, ctxt)
    if reply.has_error():
        return _as_answer(msg, reply)
    try:
        if order.plan is not None:
            trained = trained_record(reply.content, order.arrays_key)
            reply.content = _with_update(reply.content, *trained, order, held, receiver, ctxt)
        else:
            reply.content = without_model(reply.content, order.arrays_key, held)
            reply.content[REPLY_KEY] = Held(have=receiver.have()).to_record()
    except BaseMismatchError as error:
        return _answer(msg, _refusal(_CHANGED if came_whole else error, receiver))
    except DareError as error:
        return _answer(msg, _refusal(error, receiver))
    return reply


def _as_answer(msg: Message, failure: Message) -> Message:
    """A mod's failure as the answer to ``msg``.

    Flower's address theirs to the reply that they do not like, and a SuperLink drops that: the
    round would wait for nothing.
    """
    if failure.metadata.reply_to_message_id == msg.metadata.message_id:
        return failure
    return Message(failure.error, reply_to=msg)


def answer_hello(msg: Message, ctxt: Context) -> Message:
    """Say who this client is without a word of the app's code: no base is made for it."""
    try:
        order = Order.read(read_config(msg.content, ORDER_KEY) or ConfigRecord(), planned=False)
        return _answer(msg, _hello(open_receiver(order, ctxt), ctxt))
    except DareError as error:
        return _answer(msg, _refusal(error, None))


def _answer(msg: Message, answer: Hello | Refusal, metrics: MetricRecord | None = None) -> Message:
    """Our own answer; mods in front of ours may look for ``metrics``."""
    content = RecordDict({REPLY_KEY: answer.to_record()})
    if metrics is not None:
        content["metrics"] = metrics
    return Message(content, reply_to=msg)


def _refusal(error: DareError, receiver: Receiver | None) -> Refusal:
    return Refusal.of(error, receiver.have() if receiver else "")


def _hello(receiver: Receiver, context: Context) -> Hello:
    """Say who this client is."""
    uplink = float(context.node_config.get("uplink-kbit-s", 0.0))
    return Hello(name=client_name(context), have=receiver.have(), uplink_kbit_s=uplink)


@functools.cache
def _warn_of_integers(names: tuple[str, ...]) -> None:
    """Say once in a process which integers do not reach the global model."""
    if names:
        LOG.warning(
            "training changed %d integer tensors (%r, …) that stay with this client, and the "
            "global model keeps its first values: name them in 'dense' to have them averaged "
            "(integers below 2**24), or in 'exclude' where each client's own are meant",
            len(names),
            names[0],
        )


def _with_update(
    content: RecordDict,
    key: str,
    trained: ArrayRecord,
    order: Order,
    base: dict[str, Array],
    receiver: Receiver,
    context: Context,
) -> RecordDict:
    """Replace the trained arrays under ``key`` by the update; every other record stays."""
    plan = order.plan
    assert plan is not None
    returned = returned_tensors(base, to_numpy(trained), plan.terms.exclude)
    collected = content.get(STATISTICS_KEY)
    if plan.terms.statistics and not isinstance(collected, ArrayRecord):
        raise UpdateError(
            f"the server merges by {plan.terms.statistics} values, the training code returned "
            f"none; return them as an ArrayRecord under {STATISTICS_KEY!r}",
            reason="statistics",
        )
    base_arrays = {name: array.numpy() for name, array in base.items()}
    tuned = in_shape_of(base_arrays, returned)
    update = make_client_update(
        plan,
        base_arrays,
        tuned,
        to_numpy(collected) if isinstance(collected, ArrayRecord) else None,
        by_form=order.by_form,
        apart=order.apart,
    )
    terms = plan.terms
    local = split_tensors(
        base_arrays, dense=terms.dense, exclude=terms.exclude, by_form=order.by_form
    ).local
    _warn_of_integers(changed_integers(local, terms.exclude, base_arrays, tuned))
    keep_local(local, terms.exclude, tuned, context)
    records: dict[str, ArrayRecord | ConfigRecord] = {
        name: record  # type: ignore[misc]
        for name, record in content.items()
        if name not in (key, STATISTICS_KEY)
    }
    records[UPDATE_KEY] = pack(update.blob)
    if update.dense_blob is not None:
        records[DENSE_KEY] = pack(update.dense_blob)
    names: tuple[str, ...] = ()
    statistics = b""
    if update.statistics is not None:
        names, statistics = update.statistics.names, update.statistics.blob
        records[STATISTICS_KEY] = pack(statistics)
    signature = b""
    identity = context.node_config.get("identity")
    if identity is not None:
        digest = reply_digest(
            plan.digest(), update.blob, update.dense_blob, metrics_of(content), statistics
        )
        signature = load_identity(str(identity)).sign(digest)
    records[REPLY_KEY] = Receipt.of(
        plan,
        have=receiver.have(),
        delta_norm=update.delta_norm,
        delta_max=update.delta_max,
        share_above=update.share_above,
        statistics=names,
        arrays_key=key if key != order.arrays_key else "",
        signature=signature,
    ).to_record()
    return RecordDict(records)  # type: ignore[arg-type]
