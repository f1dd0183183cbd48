"""A party's side of secure sums in a Flower ClientApp.

Two lines, training code untouched::

    app = ClientApp(mods=[secure_mod, dare_mod])
    secure_queries(app)

`secure_mod` takes the training messages of a `SecureStrategy`: the delta stays here, sealed,
and only one-time keys go back. `secure_queries` answers the stages that follow, and whole
one-shot merges of a model this node already has (``model-path`` in its node config).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dare_agg.downlink.protocol import Receiver
from dare_agg.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    DareError,
    ProtocolError,
)
from dare_agg.flower.app_records import content_for_app, keep_local, trained_record
from dare_agg.flower.fields import words_of
from dare_agg.flower.internals import ClientAppCallable, FailureCode
from dare_agg.flower.reception import open_receiver, receive_base
from dare_agg.flower.records import (
    ASK_HELLO,
    ORDER_KEY,
    Order,
    Refusal,
    read_config,
)
from dare_agg.flower.secure.node import (
    check_in_clear,
    node_models,
    node_policy,
    secure_party,
)
from dare_agg.flower.secure.records import (
    QUERY,
    RESULT,
    SECURE_KEY,
    TRAIN,
    Answered,
    Begin,
    Introduce,
    Merged,
    Proof,
    Request,
    Sources,
    Step,
    Train,
    content_of,
    hello_input,
    names_of,
    read_message,
    read_request,
    stage_of,
)
from dare_agg.flower.transport import to_numpy
from dare_agg.secure.own_model import OwnModel, open_own
from dare_agg.secure.party import Contribution, Party
from dare_agg.secure.terms import SecureTerms
from dare_agg.vectors.layout import check_finite, fingerprint
from dare_agg.vectors.model import Arrays, GlobalModel, global_model

LOG = logging.getLogger("flwr")
MAX_MESSAGE = 1 << 31

FindBase = Callable[[str], str]


def secure_queries(app: ClientApp, find_base: FindBase = str) -> None:
    """Let ``app`` answer the stages of secure sums.

    ``find_base`` turns the run's word for the base model into a path on this machine, where
    the node config has no ``base-path``.
    """

    @app.query(QUERY)
    def secure(msg: Message, context: Context) -> Message:
        record = read_config(msg.content, SECURE_KEY) or ConfigRecord()
        try:
            content = _answer(msg.content, read_request(record), context, find_base)
        except DareError as error:
            content = _refusal(record, error)
        return Message(content, reply_to=msg)


def _refusal(
    record: ConfigRecord, error: DareError, receiver: Receiver | None = None
) -> RecordDict:
    LOG.warning("secure sum, stage %s: %s", stage_of(record), error)
    return content_of(Refusal.of(error, receiver.have() if receiver else ""))


def _answer(
    content: RecordDict, request: Request, context: Context, find_base: FindBase
) -> RecordDict:
    party = secure_party(context)
    if isinstance(request, Introduce):
        signature = party.identity.sign(hello_input(request.challenge, context.node_id))
        return content_of(Proof(public=party.identity.public, signature=signature))
    if isinstance(request, Train):
        raise ProtocolError("training is asked for by a query", reason="stage")
    own = _OwnFiles(request, context, find_base)
    if isinstance(request, Begin):
        opened = own.open()
        own.check_target()
        policy = node_policy(context, opened.base_fingerprint, opened.layout.fingerprint)
        advert = party.advertise(request.terms, policy)
        return content_of(Answered(stage=request.stage), advert)
    if request.stage == RESULT:
        return _take_result(content, request, party, own)

    def deltas(terms: SecureTerms) -> Contribution:
        opened = own.open(terms)
        delta = opened.delta()
        return Contribution(delta, tensors=opened.claims(delta))

    message = read_message(content, MAX_MESSAGE)
    answer = party.answer(request.stage, request.session, message, deltas)
    return content_of(Answered(stage=request.stage), answer)


def _take_result(content: RecordDict, step: Step, party: Party, own: _OwnFiles) -> RecordDict:
    """Put the merged survivors on this party's model; says what it then holds."""
    terms, mask = party.seen_through(step.session)
    opened = own.open(terms)
    data = read_message(content, 4 * terms.survivors)
    if len(data) != 4 * terms.survivors:
        raise ProtocolError(
            f"a result of {len(data)} bytes; {4 * terms.survivors} are due", reason="malformed"
        )
    delta = mask.scatter(np.frombuffer(data, "<f4").astype(np.float32))
    check_finite(opened.layout, delta, "in the result")
    _, out = node_models(own.context)
    if out is not None:
        opened.write_merged(out, delta)
    merged = opened.base.vector(opened.layout) + delta
    party.end(step.session)
    return content_of(Merged(merged=fingerprint(opened.layout, merged)))


@dataclass(frozen=True)
class _OwnFiles:
    """The model this node has, and the public base it was made from."""

    sources: Sources
    context: Context
    find_base: FindBase

    def open(self, terms: SecureTerms | None = None) -> OwnModel:
        """Open both; refuses what has changed since this party saw the terms."""
        node = self.context.node_config
        mine, _ = node_models(self.context)
        base = str(node["base-path"]) if "base-path" in node else self.find_base(self.sources.model)
        own = open_own(base, mine, self.sources.exclude)
        if terms is not None and (own.layout.fingerprint, own.base_fingerprint) != (
            terms.layout,
            terms.base,
        ):
            raise BaseMismatchError(
                "base, model or patterns are not those of the terms this party agreed to"
            )
        return own

    def check_target(self) -> None:
        _, out = node_models(self.context)
        if out is not None and out.exists():
            raise CheckpointError(f"merged-path {out} exists; name another, it is not overwritten")


# --- training ------------------------------------------------------------------------------


def secure_mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
    """Flower client mod for the training rounds of a `SecureStrategy`.

    The reply holds one-time keys and nothing of the training: no arrays, no metrics. A node
    with a ``secure-identity`` refuses to train in the clear and, without ``secure-evaluate``,
    to evaluate; messages of other nodes pass through.
    """
    record = read_config(msg.content, SECURE_KEY)
    if record is None or stage_of(record) != TRAIN:
        try:
            if not _says_hello(msg.content):
                check_in_clear(ctxt, msg.metadata.message_type)
        except DareError as error:
            LOG.warning("%s", error)
            return Message(Error(FailureCode.APP_RAISED, str(error)), reply_to=msg)
        return call_next(msg, ctxt)
    receiver: Receiver | None = None
    try:
        request = read_request(record)
        assert isinstance(request, Train)
        order = Order.read(read_config(msg.content, ORDER_KEY) or ConfigRecord(), planned=False)
        party = secure_party(ctxt)
        receiver = open_receiver(order, ctxt)
        base = receive_base(msg.content, order, receiver)
        model = global_model(
            {name: array.numpy() for name, array in base.items()},
            dense=order.dense,
            exclude=order.exclude,
        )
        policy = node_policy(ctxt, *names_of(model.ref))
        party.check(request.terms, policy)
        msg.content = content_for_app(msg.content, order.arrays_key, base, ctxt)
    except DareError as error:
        return Message(_refusal(record, error, receiver), reply_to=msg)
    reply = call_next(msg, ctxt)
    if reply.has_error():
        return reply
    try:
        tuned = to_numpy(trained_record(reply.content, order.arrays_key)[1])
        examples = _examples(reply.content, request.weighted_by_key)
        contribution = _contribution(model, tuned, examples)
        advert = party.advertise(request.terms, policy, contribution)
        keep_local(model.groups.local, order.exclude, tuned, ctxt)
    except DareError as error:
        return Message(_refusal(record, error), reply_to=msg)
    return Message(content_of(Answered(stage=TRAIN), advert), reply_to=msg)


def _says_hello(content: RecordDict) -> bool:
    """Whether `dare_mod` answers this message by itself, with the client's name."""
    order = read_config(content, ORDER_KEY) or ConfigRecord()
    return order.get(words_of(Order)["ask"]) == ASK_HELLO and not content.array_records


def _examples(content: RecordDict, key: str) -> float:
    if not key:
        return 1.0
    for record in content.values():
        value = record.get(key) if isinstance(record, MetricRecord) else None
        if isinstance(value, int | float):
            return float(value)
    raise ConfigError(
        f"the training code returned no {key!r} to weigh by; return it in a MetricRecord, or set "
        "weighting = equal"
    )


def _contribution(model: GlobalModel, tuned: Arrays, examples: float) -> Contribution:
    groups = model.groups
    delta, dense = groups.layout.flatten(tuned), groups.dense_layout.flatten(tuned)
    check_finite(groups.layout, delta, "after training")
    if dense.size:
        check_finite(groups.dense_layout, dense, "after training")
    return Contribution(delta - model.delta, dense - model.dense, examples)
