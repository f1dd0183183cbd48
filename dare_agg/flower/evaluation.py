"""A federated evaluation: the newest version to some clients, their metrics back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from dare_agg.errors import ConfigError, DareError, UpdateError
from dare_agg.flower.app_records import own_records, with_content
from dare_agg.flower.broadcasting import Broadcasting
from dare_agg.flower.clients import Client
from dare_agg.flower.exchange import exchange
from dare_agg.flower.limits import ReplyLimit
from dare_agg.flower.metrics import MetricsFn, aggregate_metrics, told_metrics
from dare_agg.flower.records import failure_of, read_answer, unread
from dare_agg.flower.standing import Standing
from dare_agg.flower.transport import message_bytes
from dare_agg.rounds.messages import ASK_EVALUATE, Held, Refusal
from dare_agg.rounds.server import check_weight
from dare_agg.rounds.weight_bound import bounded_weights

LOG = logging.getLogger("flwr")


@dataclass
class Evaluation:
    """The exchange of one evaluation after another.

    ``nbytes`` are what the last one sent, ``failures`` its failed replies: node, reason, detail;
    ``told`` what each node measured.
    """

    broadcasting: Broadcasting
    limit: ReplyLimit
    standing: Standing
    nbytes: int = 0
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    told: dict[int, dict[str, float]] = field(default_factory=dict)

    def messages(self, clients: Sequence[Client], config: ConfigRecord) -> list[Message]:
        """The messages to the chosen clients."""
        self.told = {}
        order = self.broadcasting.order(ASK_EVALUATE)
        contents = [self.broadcasting.content(client, order, config) for client in clients]
        self.nbytes = sum(message_bytes(content) for content in contents)
        return [
            Message(content, client.node, MessageType.EVALUATE)
            for client, content in zip(clients, contents, strict=True)
        ]

    def ready(self, clients: Mapping[int, Client], message: Message) -> Message:
        """A message of the app's own making, with the newest version by the downlink.

        Raises `ConfigError` for a node that is none of the clients.
        """
        node, content = message.metadata.dst_node_id, message.content
        if node not in clients:
            raise ConfigError(
                f"configure_evaluate asks node {node}, which is not online or does not take part"
            )
        config = content.get(self.broadcasting.config_key)
        known = config if isinstance(config, ConfigRecord) else ConfigRecord()
        order = self.broadcasting.order(ASK_EVALUATE)
        made = self.broadcasting.content(clients[node], order, known)
        arrays_key, config_key = self.broadcasting.arrays_key, self.broadcasting.config_key
        made.update(own_records(content, arrays_key, config_key))
        self.nbytes += message_bytes(made)
        return Message(made, node, MessageType.EVALUATE)

    def ask(self, grid: Grid, messages: Sequence[Message], timeout: float) -> list[Message]:
        """Send the messages; returns what came back."""
        replies, self.failures = [], []
        if messages:
            self.standing.ask("evaluate", (m.metadata.dst_node_id for m in messages))
        for index, reply in exchange(grid, messages, timeout, self.limit):
            sent = messages[index]
            self.standing.heard(sent.metadata.dst_node_id)
            replies.append(taken := self.take(sent, reply))
            if taken.has_error():
                self.failures.append((sent.metadata.dst_node_id, *failure_of(taken)))
        return replies

    def take(self, sent: Message, reply: Message) -> Message:
        """Note which version a client holds; returns what the app's own code sees of its reply."""
        node = sent.metadata.dst_node_id
        if reply.has_error():
            return reply
        lost = self.broadcasting.lost_version(node, reply)
        held = read_answer(reply.content, Held)
        if isinstance(held, Refusal):
            what = "it lost its version of the model and gets all of it next" if lost else ""
            return unread(UpdateError(what or held.detail, reason=held.reason), sent)
        if held is not None and held.have:
            self.broadcasting.have[node] = held.have
        own = RecordDict(dict(own_records(reply.content)))
        self.told[node] = told_metrics(own)
        return with_content(reply, own)


def evaluation_metrics(
    replies: Iterable[Message],
    known: Mapping[int, Client],
    own: MetricsFn,
    key: str,
    max_weight: float,
    weight_bound: float,
) -> MetricRecord | None:
    """Aggregate the clients' metrics, weighted by ``key``, in the order of clients."""
    rows: list[tuple[tuple[int, int, str], int, RecordDict, float]] = []
    for reply in replies:
        node = reply.metadata.src_node_id
        client = known.get(node)
        if reply.has_error():
            LOG.warning("evaluation on node %d failed: %s: %s", node, *failure_of(reply))
            continue
        if client is None:
            LOG.warning("node %d was not asked to evaluate", node)
            continue
        metrics = next(iter(reply.content.metric_records.values()), None)
        if metrics is None:
            continue
        try:
            weight = check_weight(metrics.get(key, 1.0), max_weight)
        except DareError as error:
            level = logging.INFO if error.reason == "no-examples" else logging.WARNING
            LOG.log(level, "evaluation of node %d left out: %s", node, error)
            continue
        rows.append((client.hello.order(), node, reply.content, weight))
    if not rows:
        return None
    rows.sort(key=lambda row: row[:2])
    counted = bounded_weights([weight for *_, weight in rows], weight_bound)
    total = sum(counted)
    weights = [weight / total for weight in counted]
    return aggregate_metrics(own, [content for _, _, content, _ in rows], weights, key)
