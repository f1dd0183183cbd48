"""A train exchange under way: what is sent, what the app's own code sees of it, what it passes on.

Between `receive` and `passed_on` stand the overrides and wrappers of an app. They see each
reply as FedAvg's would: the trained arrays, decoded when they are looked at, beside the client's
own records, and an error where nothing came that counts. What they pass on is what counts: a
reply that is left out does not, and records and arrays count as they are then.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from dare_agg.errors import ConfigError, DareError, LayoutError, UpdateError
from dare_agg.flower.app_records import own_records, with_content
from dare_agg.flower.broadcasting import Broadcasting
from dare_agg.flower.clients import Client
from dare_agg.flower.decoded import Decoded, decoded_arrays, is_as_decoded, with_arrays
from dare_agg.flower.exchange import LOG, exchange
from dare_agg.flower.internals import set_lifetime
from dare_agg.flower.lazy import lazy_record
from dare_agg.flower.limits import OWN_BYTES, ReplyLimit
from dare_agg.flower.records import ORDER_KEY, REPLY_KEY, is_order, unread
from dare_agg.flower.replies import Inbox, TrainReply, metrics_and_weight
from dare_agg.flower.round_outcome import Asked
from dare_agg.flower.standing import Standing
from dare_agg.flower.transport import message_bytes
from dare_agg.rounds.messages import ASK_TRAIN, one_line
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.server import Rejection, check_weight
from dare_agg.vectors.model import GlobalModel


@dataclass
class OpenRound:
    """Who got which plan, what that cost, and what came of it: who holds which version then."""

    number: int
    clients: list[Client]
    plans: dict[int, RoundPlan]
    inbox: Inbox
    broadcasting: Broadcasting
    standing: Standing
    reply_room: int = OWN_BYTES
    download: dict[int, int] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    held: dict[int, str] = field(default_factory=dict)
    model: GlobalModel = field(init=False)
    _received: bool = False
    _sent_again: set[int] = field(default_factory=set)
    _decoded: dict[int, Decoded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.broadcasting.model

    def asked(self) -> Asked:
        """Who was asked, as measurements tell it."""
        return Asked(
            self.number,
            self.started,
            {self.plans[client.node].client: client.hello.name for client in self.clients},
            [self.download[client.node] for client in self.clients],
            self.inbox.duplicates,
        )

    # --- out -------------------------------------------------------------------------------

    def message(
        self, client: Client, config: ConfigRecord, own: Mapping[str, object] | None = None
    ) -> Message:
        """The message that asks a client to train; ``own`` are further records of the app."""
        order = self.broadcasting.order(ASK_TRAIN, self.plans[client.node])
        content = self.broadcasting.content(client, order, config)
        content.update(own or {})  # type: ignore[arg-type]
        self.download[client.node] = self.download.get(client.node, 0) + message_bytes(content)
        return Message(content, client.node, MessageType.TRAIN)

    def is_ours(self, message: Message) -> bool:
        """Whether a message asks one of the round's clients to train."""
        kind = message.metadata.message_type
        return kind == MessageType.TRAIN and message.metadata.dst_node_id in self.plans

    def _anew(self, message: Message) -> Message:
        """The same question once more, with what its client is known to lack by now."""
        content, key = message.content, self.broadcasting.config_key
        config = content.get(key)
        own = own_records(content, self.broadcasting.arrays_key, key)
        client = next(c for c in self.clients if c.node == message.metadata.dst_node_id)
        return self.message(
            client, config if isinstance(config, ConfigRecord) else ConfigRecord(), own
        )

    def _is_model(self, record: object) -> bool:
        arrays = self.broadcasting.arrays
        if record is arrays:
            return True
        return isinstance(record, ArrayRecord) and (
            len(record) == len(arrays)
            and all(a is record.get(n) or a == record.get(n) for n, a in arrays.items())
        )

    # --- in --------------------------------------------------------------------------------

    def receive(self, grid: Grid, messages: Sequence[Message], limit: float) -> list[Message]:
        """Send the messages; returns the replies in the order of clients, as the app sees them.

        Who lost its version is sent the full model once more, in the same ``limit`` seconds.
        Raises `ConfigError` for a message with another model, and as `exchange` does.
        """
        until = time.monotonic() + limit
        found: dict[int, Message] = {}
        self._ask_only({message.metadata.dst_node_id for message in messages})
        messages = [self.ready(message) for message in messages]
        self.standing.ask("train", self.plans)
        while messages and (left := until - time.monotonic()) > 0:
            for message in messages:
                set_lifetime(message, left + 60)
            again: list[Message] = []
            for index, reply in exchange(grid, messages, left, self.room()):
                shown = self.take(messages[index], reply)
                if is_order(shown):
                    again.append(shown)
                else:
                    found[messages[index].metadata.dst_node_id] = shown
                    self.standing.heard(messages[index].metadata.dst_node_id)
            messages = again
            if again:
                LOG.info(
                    "%d clients no longer hold their version; sending what they lack", len(again)
                )
        self.inbox.close()
        self.standing.note("merge")
        return [found[c.node] for c in self.clients if c.node in found]

    def ready(self, message: Message) -> Message:
        """A message to one of the round's clients as it is sent.

        One that the app's own code made gets the round's plan. Raises `ConfigError` for one with
        another model.
        """
        self._received = True
        given = message.content.get(self.broadcasting.arrays_key)
        if given is not None and not self._is_model(given):
            raise ConfigError(
                f"configure_train sends node {message.metadata.dst_node_id} other arrays than the "
                "global model; all clients of a round start from one model: leave them as they are"
            )
        return message if ORDER_KEY in message.content else self._anew(message)

    def room(self) -> ReplyLimit:
        """Most that a reply may hold."""
        return self.inbox.limit(self.reply_room)

    def take(self, sent: Message, reply: Message) -> Message:
        """Judge a reply; returns what the app's own code sees in its place.

        Or the message with the whole model, where its client lost the version; once.
        """
        node = sent.metadata.dst_node_id
        if node not in self._sent_again and self.broadcasting.lost_version(node, reply):
            self._sent_again.add(node)
            return self._anew(sent)
        self.broadcasting.note_apart(reply)
        strangers = len(self.inbox.strangers)
        self.inbox.take(node, reply)
        judged, rejection = self.inbox.replies.get(node), self.inbox.rejections.get(node)
        if judged is not None and len(self.inbox.strangers) == strangers:
            return with_content(reply, self._content(judged))
        if reply.has_error():
            return reply
        rejection = rejection or self.inbox.strangers[-1]
        why = UpdateError(f"{rejection.reason}: {rejection.detail}", reason=rejection.reason)
        return unread(why, sent)

    def _ask_only(self, nodes: set[int]) -> None:
        """The app's own code may ask fewer clients than were drawn."""
        self.clients = [client for client in self.clients if client.node in nodes]
        self.plans = {node: plan for node, plan in self.plans.items() if node in nodes}
        self.inbox.plans = self.plans

    def _content(self, judged: TrainReply) -> RecordDict:
        decoded = self._decoded[judged.node] = decoded_arrays(self.model, judged.accepted)
        return RecordDict({self._key_of(judged): lazy_record(decoded), **judged.content})

    def _key_of(self, judged: TrainReply) -> str:
        """What the arrays of a reply stand under: what its app returned them under."""
        return judged.receipt.arrays_key or self.broadcasting.arrays_key

    # --- and on ----------------------------------------------------------------------------

    def passed_on(self, replies: Iterable[Message]) -> list[TrainReply]:
        """What is merged of the replies that aggregate_train was given, in the order of clients.

        They are what `receive` returned, what the app's own code made of that, or replies as
        Flower's grid received them.
        """
        passed: dict[int, RecordDict] = {}
        received: set[int] = set()
        for reply in replies:
            node = reply.metadata.src_node_id
            if self._is_as_received(reply):
                self.inbox.take(node, reply)
                received.add(node)
            elif not reply.has_error():
                self._pass(node, reply.content, passed)
        self.inbox.close()
        for node in received & set(self.inbox.replies):
            passed[node] = self._content(self.inbox.replies[node])
        self.held = {reply.node: reply.receipt.have for reply in self.inbox.in_order()}
        found = [self._settled(judged, passed) for judged in self.inbox.in_order()]
        return [reply for reply in found if reply is not None]

    def _is_as_received(self, reply: Message) -> bool:
        if reply.has_error() or self._received:
            return not self._received
        return REPLY_KEY in reply.content or reply.metadata.src_node_id not in self.inbox.replies

    def _pass(self, node: int, content: RecordDict, passed: dict[int, RecordDict]) -> None:
        if node not in self.inbox.replies:
            self.inbox.reject_stranger(
                node,
                "aggregate_train was given a message in its name, and nothing that counts came "
                "from it in this round; change the content of replies, do not make new ones",
            )
        elif node not in passed:
            passed[node] = content
        elif content is passed[node]:
            self.inbox.duplicates += 1
        else:
            self.inbox.drop_both(node)

    def _settled(self, judged: TrainReply, passed: Mapping[int, RecordDict]) -> TrainReply | None:
        """The reply as it was passed on, None where it does not count."""
        plan, content = judged.accepted.plan, passed.get(judged.node)
        if content is None:
            detail = "the app's own aggregate_train did not pass it on"
            self.inbox.reject(judged.node, Rejection(plan.client, "left-out", detail))
            return None
        try:
            metrics, weight = metrics_and_weight(
                content, self.inbox.weighted_by_key, self.inbox.weighting
            )
            accepted = replace(judged.accepted, weight=check_weight(weight, plan.terms.max_weight))
            record = self._arrays_of(content, self._key_of(judged))
            decoded = self._decoded[judged.node]
            if not is_as_decoded(record, decoded):
                accepted = with_arrays(self.model, accepted, record, decoded)
        except DareError as error:
            self.inbox.reject(judged.node, Rejection(plan.client, error.reason, one_line(error)))
            return None
        return replace(judged, accepted=accepted, content=content, metrics=metrics)

    def _arrays_of(self, content: RecordDict, key: str) -> ArrayRecord:
        records = content.array_records
        if key not in records and len(records) == 1:
            key = next(iter(records))
        if key not in records:
            raise LayoutError(
                f"aggregate_train was given a reply with {len(records)} ArrayRecords, none under "
                f"{key!r}; pass on the arrays, changed or not"
            )
        return records[key]
