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
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dare_agg.downlink.protocol import Receiver
from dare_agg.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    DareError,
    ProtocolError,
)
from dare_agg.flower.app_records import (
    content_for_app,
    set_local_aside,
    settle_local,
    trained_record,
    without_copies,
)
from dare_agg.flower.internals import ClientAppCallable, FailureCode, app_mods
from dare_agg.flower.mod import answer_hello
from dare_agg.flower.reception import open_receiver, receive_base
from dare_agg.flower.records import ORDER_KEY, read_config
from dare_agg.flower.secure.gate import (
    KEPT_HERE,
    in_fixed_words,
    is_asked_well,
    is_guarded,
    refusal_of,
    turned_away,
)
from dare_agg.flower.secure.node import (
    node_models,
    node_policy,
    secure_party,
)
from dare_agg.flower.secure.records import (
    CONTRIBUTE,
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
    Step,
    Train,
    content_of,
    hello_input,
    names_of,
    read_message,
    read_request,
    stage_of,
)
from dare_agg.flower.secure.training import own_tensors, training_of
from dare_agg.rounds.messages import Order
from dare_agg.secure.own_model import OwnModel, open_own
from dare_agg.secure.party import Contribution, Party
from dare_agg.secure.result import read_result, result_bytes, vector_of
from dare_agg.secure.sketch import sketch_of
from dare_agg.secure.terms import SecureTerms, decode_terms
from dare_agg.vectors.layout import FloatVector, Layout, check_finite, fingerprint
from dare_agg.vectors.model import Arrays, GlobalModel, global_model
from dare_agg.vectors.returned import returned_tensors

LOG = logging.getLogger("flwr")
MAX_MESSAGE = 1 << 31

FindBase = Callable[[str], str]


def secure_queries(app: ClientApp, find_base: FindBase = str) -> None:
    """Let ``app`` answer the stages of secure sums.

    ``find_base`` turns the run's word for the base model into a path on this machine, for
    simulations; a node with a ``secure-identity`` takes the base from its own ``base-path``.
    Raises `ConfigError` where `secure_mod` is not among the app's mods: then nothing would keep
    the app's other functions from answering a server.
    """
    if secure_mod not in app_mods(app):
        raise ConfigError(
            "secure_queries needs secure_mod among the app's mods; write "
            "ClientApp(mods=[secure_mod, dare_mod])"
        )

    @app.query(QUERY)
    def secure(msg: Message, context: Context) -> Message:
        record = read_config(msg.content, SECURE_KEY) or ConfigRecord()
        try:
            content = _answer(msg.content, read_request(record), context, find_base)
        except Exception as error:
            content = refusal_of(error, context, stage_of(record))
        return Message(content, reply_to=msg)


def _answer(
    content: RecordDict, request: Request, context: Context, find_base: FindBase
) -> RecordDict:
    party = secure_party(context)
    if isinstance(request, Introduce):
        signature = party.identity.sign(hello_input(request.challenge, context.node_id))
        return content_of(Proof(public=party.identity.public, signature=signature))
    if isinstance(request, Train):
        raise ProtocolError("training is asked for by a query", reason="stage")
    own = _OwnFiles(request.model, context, find_base)
    if isinstance(request, Begin):
        terms = decode_terms(request.terms)
        opened = own.open(terms.exclude)
        terms.check_layout(opened.base.layout)
        own.check_target()
        policy = node_policy(context, opened.base.fingerprint, opened.base.layout.fingerprint)
        advert = party.advertise(request.terms, policy)
        return content_of(Answered(stage=request.stage), advert)
    if request.stage == RESULT:
        return _take_result(content, request, party, own)

    def deltas(terms: SecureTerms) -> Contribution:
        opened = own.agreed(terms)
        delta, layout = opened.delta(), opened.base.layout
        sketch = _sketch(terms, layout, delta)
        return Contribution(delta, tensors=opened.claims(delta), sketch=sketch)

    message = read_message(content, MAX_MESSAGE)
    answer = party.answer(request.stage, request.session, message, deltas)
    if request.stage == CONTRIBUTE:
        settle_local(request.session, context)
    return content_of(Answered(stage=request.stage), answer)


def _take_result(content: RecordDict, step: Step, party: Party, own: _OwnFiles) -> RecordDict:
    """Put the merged delta on this party's model; says what it then holds."""
    terms, mask = party.seen_through(step.session)
    opened = own.agreed(terms)
    base = opened.base
    data = read_message(content, result_bytes(terms))
    delta = vector_of(read_result(terms, mask, base.layout, data))
    check_finite(base.layout, delta, "in the result")
    _, out = node_models(own.context)
    if out is not None:
        opened.write_merged(out, delta)
    merged = base.vector() + delta
    party.end(step.session)
    return content_of(Merged(merged=fingerprint(base.layout, merged)))


@dataclass(frozen=True)
class _OwnFiles:
    """The model this node has, and the public base it was made from.

    ``word`` is the run's for the base; where the node says where its base is, it has no say.
    """

    word: str
    context: Context
    find_base: FindBase

    def open(self, exclude: Iterable[str]) -> OwnModel:
        """Open both, without the tensors of ``exclude``."""
        node = self.context.node_config
        mine, _ = node_models(self.context)
        if "base-path" in node:
            base = str(node["base-path"])
        elif is_guarded(self.context):
            raise ConfigError(
                "this node does not say which base its model was made from; name it in "
                "--node-config: base-path=FOLDER"
            )
        else:
            base = self.find_base(self.word)
        return open_own(base, mine, exclude)

    def agreed(self, terms: SecureTerms) -> OwnModel:
        """Open both again; refuses files that have changed since this party saw the terms."""
        own = self.open(terms.exclude)
        if (own.base.layout.fingerprint, own.base.fingerprint) != (terms.layout, terms.base):
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

    The reply holds one-time keys and nothing of the training: no arrays, no metrics, no
    exception. A node with a ``secure-identity`` answers nothing but the protocol
    (`dare_agg.flower.secure.gate`); messages of other nodes pass through.
    """
    guarded = is_guarded(ctxt)
    if guarded and not is_asked_well(msg, ctxt):
        return turned_away(msg)
    record = read_config(msg.content, SECURE_KEY)
    if msg.metadata.message_type == MessageType.TRAIN and record and stage_of(record) == TRAIN:
        return Message(_train(msg, record, ctxt, call_next), reply_to=msg)
    is_protocol = msg.metadata.message_type.startswith(MessageType.QUERY)
    if not guarded or is_protocol:
        return call_next(msg, ctxt)
    is_hello = msg.metadata.message_type == MessageType.TRAIN
    try:
        reply = answer_hello(msg, ctxt) if is_hello else call_next(msg, ctxt)
    except Exception:
        LOG.warning("secure party: its own code failed", exc_info=True)
        return Message(Error(FailureCode.APP_RAISED, KEPT_HERE), reply_to=msg)
    return in_fixed_words(reply, msg)


def _train(
    msg: Message, record: ConfigRecord, ctxt: Context, call_next: ClientAppCallable
) -> RecordDict:
    """Train on what the terms say, keep the delta, and answer with keys."""
    receiver: Receiver | None = None
    try:
        request = read_request(record)
        assert isinstance(request, Train)
        order = Order.read(read_config(msg.content, ORDER_KEY) or ConfigRecord(), planned=False)
        terms = decode_terms(request.terms)
        if (order.dense, order.exclude) != (terms.dense_patterns, terms.exclude):
            raise ProtocolError("the order has other patterns than the terms", reason="terms")
        party = secure_party(ctxt)
        receiver = open_receiver(order, ctxt)
        base = receive_base(msg.content, order, receiver)
        arrays = {name: array.numpy() for name, array in base.items()}
        followed = receiver.followed()
        model = followed or global_model(
            arrays,
            dense=terms.dense_patterns,
            exclude=terms.exclude,
            by_form=order.by_form,
            apart=order.apart,
        )
        terms.check_layout(model.groups.layout)
        # By the values it has here, whatever a server calls the version: ledgers know it so.
        policy = node_policy(ctxt, *names_of(model.fingerprints))
        party.check(request.terms, policy)
        _check_training(msg.content, order, request, arrays, ctxt, terms)
        own = own_tensors(msg, model.groups.local, terms.exclude, ctxt, request.after)
        msg.content = content_for_app(msg.content, order.arrays_key, {**base, **own})
        reply = call_next(msg, ctxt)
        if reply.has_error():
            raise DareError(f"the training code failed: {reply.error.reason}")
        found = trained_record(reply.content, order.arrays_key)[1]
        whole = found if followed is None else without_copies(found, arrays)
        trained = {name: array.numpy() for name, array in whole.items()}
        own_arrays = {name: array.numpy() for name, array in own.items()}
        returned = returned_tensors(arrays, trained, terms.exclude)
        tuned = model.groups.completed({**arrays, **own_arrays}, returned)
        examples = _examples(reply.content, request.weighted_by_key)
        contribution = _contribution(model, tuned, examples, terms)
        advert = party.advertise(request.terms, policy, contribution)
        set_local_aside(model.groups.local, terms.exclude, tuned, terms.session, ctxt)
    except Exception as error:
        return refusal_of(error, ctxt, TRAIN, receiver)
    return content_of(Answered(stage=TRAIN), advert)


def _check_training(
    content: RecordDict,
    order: Order,
    request: Train,
    arrays: Arrays,
    context: Context,
    terms: SecureTerms,
) -> None:
    """Refuse to train on anything else than what all who signed the terms train on."""
    mine = training_of(
        content,
        {order.arrays_key: arrays},
        context.run_config,
        weighted_by_key=request.weighted_by_key,
        after=request.after,
    )
    if mine != terms.training:
        raise ProtocolError(
            "run config, records or arrays of this message are not those of the terms: all "
            "parties must be told the same (on the server: SecureStrategy(run_config="
            "context.run_config))",
            reason="training",
        )


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


def _contribution(
    model: GlobalModel, tuned: Arrays, examples: float, terms: SecureTerms
) -> Contribution:
    groups = model.groups
    delta, dense = groups.layout.flatten(tuned), groups.flatten_dense(tuned)
    check_finite(groups.layout, delta, "after training")
    if dense.size:
        check_finite(groups.dense_layout, dense, "after training")
    delta -= model.delta[:]
    sketch = _sketch(terms, groups.layout, delta)
    return Contribution(delta, dense - model.dense, examples, sketch=sketch)


def _sketch(terms: SecureTerms, layout: Layout, delta: FloatVector) -> FloatVector:
    if not terms.sketch:
        return np.empty(0, np.float32)
    return sketch_of(terms.sketch_plan(layout), delta)
