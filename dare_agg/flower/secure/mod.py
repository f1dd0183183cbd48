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

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dare_agg.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    DareError,
    LayoutError,
    ProtocolError,
)
from dare_agg.flower.internals import ClientAppCallable, FailureCode
from dare_agg.flower.mod import LOCAL_KEY, receive_base, receiver_of
from dare_agg.flower.records import (
    ASK_HELLO,
    DOWN_PREFIX,
    ORDER_KEY,
    one_line,
    read_config,
)
from dare_agg.flower.secure.node import (
    check_in_clear,
    node_models,
    node_policy,
    secure_party,
)
from dare_agg.flower.secure.records import (
    ADVERTISE,
    HELLO,
    QUERY,
    RESULT,
    SECURE_KEY,
    TRAIN,
    hello_input,
    names_of,
    read_bytes,
    read_message,
    read_words,
    same_code,
    secure_content,
)
from dare_agg.flower.transport import to_numpy, to_record
from dare_agg.secure.own_model import OwnModel, open_own
from dare_agg.secure.party import REQUESTS, Contribution
from dare_agg.secure.terms import SecureTerms
from dare_agg.vectors.layout import check_finite, fingerprint
from dare_agg.vectors.model import Arrays, GlobalModel, global_model
from dare_agg.vectors.patterns import compile_patterns, matches

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
        order = read_config(msg.content, SECURE_KEY) or ConfigRecord()
        try:
            same_code(order, "server", "this client")
            content = _answer(msg.content, order, context, find_base)
        except DareError as error:
            content = _refusal(order, error)
        return Message(content, reply_to=msg)


def _refusal(order: ConfigRecord, error: DareError, **more: str) -> RecordDict:
    LOG.warning("secure sum, stage %s: %s", one_line(order.get("stage"), 32), error)
    return secure_content(
        one_line(order.get("stage"), 32), refused=error.reason, detail=one_line(error), **more
    )


def _answer(
    content: RecordDict, order: ConfigRecord, context: Context, find_base: FindBase
) -> RecordDict:
    stage = str(order.get("stage"))
    party = secure_party(context)
    if stage == HELLO:
        challenge = read_bytes(order, "challenge", 32)
        signature = party.identity.sign(hello_input(challenge, context.node_id))
        return secure_content(stage, public=party.identity.public, signature=signature)
    if stage == ADVERTISE:
        own = _own_model(order, context, find_base)
        _check_target(context)
        policy = node_policy(context, own.base_fingerprint, own.layout.fingerprint)
        advert = party.advertise(read_bytes(order, "terms"), policy)
        return secure_content(stage, b"", advert)
    session = read_bytes(order, "session", 32)
    if stage in REQUESTS:

        def deltas(terms: SecureTerms) -> Contribution:
            own = _checked(_own_model(order, context, find_base), terms)
            delta = own.delta()
            return Contribution(delta, tensors=own.claims(delta))

        request = read_message(content, MAX_MESSAGE)
        answer = party.answer(stage, session, request, deltas)
        return secure_content(stage, session, answer)
    if stage == RESULT:
        terms, mask = party.seen_through(session)
        own = _checked(_own_model(order, context, find_base), terms)
        data = read_message(content, 4 * terms.survivors)
        if len(data) != 4 * terms.survivors:
            raise ProtocolError(
                f"a result of {len(data)} bytes; {4 * terms.survivors} are due", reason="malformed"
            )
        delta = mask.scatter(np.frombuffer(data, "<f4").astype(np.float32))
        check_finite(own.layout, delta, "in the result")
        _, out = node_models(context)
        if out is not None:
            own.write_merged(out, delta)
        merged = own.base.vector(own.layout) + delta
        party.end(session)
        return secure_content(stage, session, merged=fingerprint(own.layout, merged))
    raise ProtocolError(f"stage {one_line(stage, 32)!r} is unknown", reason="stage")


def _own_model(order: ConfigRecord, context: Context, find_base: FindBase) -> OwnModel:
    node = context.node_config
    mine, _ = node_models(context)
    base = str(node["base-path"]) if "base-path" in node else find_base(str(order.get("model")))
    return open_own(base, mine, read_words(order, "exclude"))


def _checked(own: OwnModel, terms: SecureTerms) -> OwnModel:
    """Refuse patterns or files that have changed since this party saw the terms."""
    if own.layout.fingerprint != terms.layout or own.base_fingerprint != terms.base:
        raise BaseMismatchError(
            "base, model or patterns are not those of the terms this party agreed to"
        )
    return own


def _check_target(context: Context) -> None:
    _, out = node_models(context)
    if out is not None and out.exists():
        raise CheckpointError(f"merged-path {out} exists; name another, it is not overwritten")


# --- training ------------------------------------------------------------------------------


def secure_mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
    """Flower client mod for the training rounds of a `SecureStrategy`.

    The reply holds one-time keys and nothing of the training: no arrays, no metrics. A node
    with a ``secure-identity`` refuses to train in the clear and, without ``secure-evaluate``,
    to evaluate; messages of other nodes pass through.
    """
    order = read_config(msg.content, SECURE_KEY)
    if order is None or order.get("stage") != TRAIN:
        try:
            if not _says_hello(msg.content):
                check_in_clear(ctxt, msg.metadata.message_type)
        except DareError as error:
            LOG.warning("%s", error)
            return Message(Error(FailureCode.APP_RAISED, str(error)), reply_to=msg)
        return call_next(msg, ctxt)
    try:
        same_code(order, "server", "this client")
        terms = read_bytes(order, "terms")
        party = secure_party(ctxt)
        key = str(order.get("arrays-key", "arrays"))
        down = read_config(msg.content, ORDER_KEY) or ConfigRecord()
        base = {n: a.numpy() for n, a in receive_base(msg.content, down, ctxt).items()}
        dense, exclude = read_words(order, "dense"), read_words(order, "exclude")
        model = global_model(base, dense=dense, exclude=exclude)
        policy = node_policy(ctxt, *names_of(model.ref))
        party.check(terms, policy)
        msg.content = _for_app(msg.content, key, base, ctxt)
    except BaseMismatchError as error:
        have = receiver_of(down, ctxt).have()
        return Message(_refusal(order, error, have=have or "-"), reply_to=msg)
    except DareError as error:
        return Message(_refusal(order, error), reply_to=msg)
    reply = call_next(msg, ctxt)
    if reply.has_error():
        return reply
    try:
        tuned = _tuned(reply.content, key)
        examples = _examples(reply.content, str(order.get("weighted-by-key", "")))
        contribution = _contribution(model, tuned, examples)
        advert = party.advertise(terms, policy, contribution)
        _keep_local(model, tuned, exclude, ctxt)
    except DareError as error:
        return Message(_refusal(order, error), reply_to=msg)
    return Message(secure_content(TRAIN, b"", advert), reply_to=msg)


def _says_hello(content: RecordDict) -> bool:
    """Whether `dare_mod` answers this message by itself, with the client's name."""
    order = read_config(content, ORDER_KEY)
    return order is not None and order.get("ask") == ASK_HELLO and not content.array_records


def _for_app(content: RecordDict, key: str, base: Arrays, context: Context) -> RecordDict:
    """What the app's own code sees: full arrays, with this client's local tensors."""
    arrays = to_record(base)
    kept = context.state.get(LOCAL_KEY)
    if isinstance(kept, ArrayRecord):
        arrays = ArrayRecord({**dict(arrays.items()), **dict(kept.items())})
    others = {
        name: r
        for name, r in content.items()
        if name not in (SECURE_KEY, ORDER_KEY, key) and not name.startswith(DOWN_PREFIX)
    }
    return RecordDict({key: arrays, **others})


def _tuned(content: RecordDict, key: str) -> Arrays:
    found = {name: r for name, r in content.items() if isinstance(r, ArrayRecord)}
    if key not in found and len(found) == 1:
        key = next(iter(found))
    if key not in found:
        raise LayoutError(
            f"the training code returned {len(found)} ArrayRecords, none under {key!r}; return "
            f"the trained arrays as RecordDict({{{key!r}: ArrayRecord(...)}})"
        )
    return to_numpy(found[key])


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


def _keep_local(
    model: GlobalModel, tuned: Arrays, exclude: tuple[str, ...], context: Context
) -> None:
    """Keep this client's own tensors (heads, buffers) for its next round."""
    patterns = compile_patterns(exclude)
    local = set(model.groups.local)
    kept = {n: array for n, array in tuned.items() if n in local or matches(n, patterns)}
    if kept:
        context.state[LOCAL_KEY] = to_record(kept)
