"""The client mod: full arrays in front of it, a compact update behind it.

``ClientApp(mods=[dare_mod])`` is the whole change in an app. The training code gets ordinary
arrays under the key it knows and returns ordinary arrays; the mod forms the delta, drops,
quantises and sends. Messages of other strategies (FedAvg) pass through untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)

from dare_agg.codec.rotated_formats import ROTATED
from dare_agg.downlink.protocol import Receiver
from dare_agg.errors import BaseMismatchError, DareError
from dare_agg.flower.app_records import (
    changed_integers,
    content_for_app,
    keep_local,
    kept_local,
    trained_record,
    unmoved_tensors,
    without_copies,
    without_model,
)
from dare_agg.flower.base_pieces import Taken, take_piece
from dare_agg.flower.internals import ClientAppCallable
from dare_agg.flower.lazy import is_untouched
from dare_agg.flower.reception import (
    client_name,
    folder_of,
    look_for_base,
    open_receiver,
    receive_base,
)
from dare_agg.flower.records import ORDER_KEY, REPLY_KEY, STATISTICS_KEY, read_config
from dare_agg.flower.transport import to_numpy
from dare_agg.flower.turns import (
    Turn,
    is_answered,
    missing_statistics,
    model_of_arrays,
    warn_of_integers,
    warn_of_unmoved,
)
from dare_agg.flower.update_answer import update_answer
from dare_agg.rounds.client import update_of_arrays
from dare_agg.rounds.messages import ASK_BASE, ASK_HELLO, Held, Hello, Order, Refusal, one_line
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
        receiver = open_receiver(order, ctxt, msg)
        if order.ask == ASK_HELLO:
            look_for_base(msg, receiver, ctxt)
            return _answer(msg, _hello(receiver, ctxt), MetricRecord())
        if order.ask == ASK_BASE:
            return _answer(msg, take_piece(msg.content, order, folder_of(ctxt)))
        if order.not_merged:
            LOG.warning("this client's last update was not merged: %s", one_line(order.not_merged))
        base = receive_base(msg.content, order, receiver)
        arrays = {**base, **kept_local(ctxt)}
        came_whole = order.arrays_key in msg.content
        msg.content = content_for_app(msg.content, order.arrays_key, arrays)
    except DareError as error:
        return _answer(msg, _refusal(error, receiver))
    form = {name: tuple(array.shape) for name, array in base.items()}
    # Training code may empty the record it is handed. What lies on disk need not be held.
    held = {} if receiver.followed() else dict(base)
    del base, arrays
    turn = Turn(msg, order, receiver, held, ctxt)
    try:
        with turn.opened():
            reply = call_next(msg, ctxt)
    except DareError as error:
        if error is not turn.failed:
            raise
        return turn.refuse(error)
    if reply.has_error():
        return _as_answer(msg, reply)
    if is_answered(reply.content):
        return reply
    try:
        if order.plan is not None:
            trained = trained_record(reply.content, order.arrays_key)
            reply.content = _with_update(reply.content, *trained, order, held, receiver, ctxt)
        else:
            reply.content = without_model(reply.content, order.arrays_key, form)
            held_now = Held(have=receiver.have())
            reply.content[REPLY_KEY] = ConfigRecord(held_now.to_record())
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


def _answer(
    msg: Message, answer: Hello | Taken | Refusal, metrics: MetricRecord | None = None
) -> Message:
    """Our own answer; mods in front of ours may look for ``metrics``."""
    content = RecordDict({REPLY_KEY: ConfigRecord(answer.to_record())})
    if metrics is not None:
        content["metrics"] = metrics
    return Message(content, reply_to=msg)


def _refusal(error: DareError, receiver: Receiver | None) -> Refusal:
    return Refusal.of(error, receiver.have() if receiver else "")


def _hello(receiver: Receiver, context: Context) -> Hello:
    """Say who this client is."""
    uplink = float(context.node_config.get("uplink-kbit-s", 0.0))
    return Hello(name=client_name(context), have=receiver.have(), uplink_kbit_s=uplink)


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
    exclude = plan.terms.exclude
    followed = receiver.followed()
    names: Mapping[str, object] = base if followed is None else followed.arrays()
    whole = trained if followed is None else without_copies(trained, names)
    found = returned_tensors(names, whole, exclude)
    # What was only handed through is the version's own, and is not read.
    returned = {name: array.numpy() for name, array in found.items() if not is_untouched(array)}
    collected = content.get(STATISTICS_KEY)
    if plan.terms.statistics and not isinstance(collected, ArrayRecord):
        raise missing_statistics(plan)
    start = followed or model_of_arrays(order, base)
    arrays, local = start.arrays(), start.groups.local
    tuned = in_shape_of(arrays, returned)
    statistics = to_numpy(collected) if isinstance(collected, ArrayRecord) else None
    update = update_of_arrays(plan, start, tuned, statistics)
    warn_of_integers(changed_integers(local, exclude, arrays, tuned))
    layout = start.groups.layout
    if plan.terms.values in ROTATED:
        warn_of_unmoved(unmoved_tensors(layout.names, arrays, tuned), len(layout.names))
    keep_local(local, exclude, tuned, context)
    rest = {n: record for n, record in content.items() if n not in (key, STATISTICS_KEY)}
    return update_answer(update, order, rest, receiver.have(), context, arrays_key=key)
