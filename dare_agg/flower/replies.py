"""Judging the replies of a round, one by one, as they come.

A bad reply becomes a `Rejection` with a reason and never an exception: the round goes on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Message, MetricRecord, RecordDict

from dare_agg.errors import DareError, UpdateError
from dare_agg.flower.app_records import own_records
from dare_agg.flower.limits import ReplyLimit
from dare_agg.flower.records import (
    DENSE_KEY,
    STATISTICS_KEY,
    UPDATE_KEY,
    failure_of,
    metrics_of,
    read_answer,
    read_payload,
)
from dare_agg.flower.transport import message_bytes
from dare_agg.rounds.directions import most_bytes
from dare_agg.rounds.messages import Receipt, Refusal, one_line
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.server import Accepted, Rejection, check_reply, most_payload
from dare_agg.rounds.settings import WEIGHTINGS
from dare_agg.rounds.signing import check_signature, reply_digest
from dare_agg.rounds.statistics import StatisticsUpdate, statistics_spec
from dare_agg.vectors.layout import Layout

LOG = logging.getLogger("flwr")

# Of replies that count for nothing, and nobody is to blame.
_LEFT_OUT = ("left-out", "no-examples")


@dataclass(frozen=True)
class TrainReply:
    """A reply that answers its plan: the update, the app's own records, and what it cost.

    What it weighs is read of what the app's own code passes on (`metrics_and_weight`): until
    then its weight is 1, and there are no metrics.
    """

    node: int
    accepted: Accepted
    content: RecordDict
    update_bytes: int
    dense_bytes: int
    statistics_bytes: int
    message_bytes: int
    receipt: Receipt
    digest: bytes
    metrics: MetricRecord = field(default_factory=MetricRecord)


@dataclass
class Inbox:
    """The replies of one train exchange. ``plans`` maps node id to its plan; ``layout`` is
    the delta group's, needed where the plans ask for statistics or keep rates by tensor."""

    plans: Mapping[int, RoundPlan]
    weighted_by_key: str = "num-examples"
    weighting: str = "examples"
    replies: dict[int, TrainReply] = field(default_factory=dict)
    rejections: dict[int, Rejection] = field(default_factory=dict)
    strangers: list[Rejection] = field(default_factory=list)
    signers: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    duplicates: int = 0
    layout: Layout | None = None

    def limit(self, own: int) -> ReplyLimit:
        """Most that a reply may hold, ``own`` bytes of the app's records included."""
        payloads = [_payload_bytes(plan, self.layout) for plan in self.plans.values()]
        return ReplyLimit(max(payloads, default=0), own)

    def take(self, node: int, message: Message) -> None:
        """Judge one reply to the message that was sent to ``node``."""
        plan = self.plans.get(node)
        if plan is None:
            self.reject_stranger(node, "no plan of this round is for this node")
            return
        # Error replies on a node's behalf come from the SuperLink.
        if not message.has_error() and message.metadata.src_node_id != node:
            self.reject_stranger(
                message.metadata.src_node_id, f"it answered the message for node {node}"
            )
            return
        signer = self.signers.get(node)
        judged = judge(plan, node, message, signer, self.layout, self.weighted_by_key)
        earlier = self.replies.get(node)
        if earlier is not None or node in self.rejections:
            self._take_again(node, earlier, judged)
        elif isinstance(judged, Rejection):
            self.reject(node, judged)
        else:
            self.replies[node] = judged

    def close(self) -> None:
        """Note every client that did not answer in time."""
        for node, plan in self.plans.items():
            if node not in self.replies and node not in self.rejections:
                self.reject(
                    node,
                    Rejection(plan.client, "late", "no answer before the round's deadline"),
                )

    def in_order(self) -> list[TrainReply]:
        """The accepted replies in the order of merging."""
        return sorted(self.replies.values(), key=lambda reply: reply.accepted.plan.client)

    def all_rejections(self) -> list[Rejection]:
        """Rejected replies by client, then those of nodes that were asked nothing."""
        ordered = sorted(self.rejections.values(), key=lambda rejection: rejection.client)
        return [*ordered, *self.strangers]

    def _take_again(self, node: int, earlier: TrainReply | None, judged: object) -> None:
        if (
            earlier is not None
            and isinstance(judged, TrainReply)
            and judged.digest == earlier.digest
        ):
            self.duplicates += 1
        else:
            self.drop_both(node)

    def drop_both(self, node: int) -> None:
        """Two different answers of one node: neither counts."""
        self.duplicates += 1
        detail = "two different answers in one round; both dropped"
        self.reject(node, Rejection(self.plans[node].client, "duplicate", detail))

    def reject(self, node: int, rejection: Rejection) -> None:
        """Note why a node's answer does not count, and take it out of those that do."""
        self.replies.pop(node, None)
        self.rejections[node] = rejection
        if rejection.reason in _LEFT_OUT:
            LOG.info(
                "client %d (node %d) is left out: %s", rejection.client, node, rejection.detail
            )
            return
        LOG.warning(
            "rejected client %d (node %d): %s: %s",
            rejection.client,
            node,
            rejection.reason,
            rejection.detail,
        )

    def reject_stranger(self, node: int, detail: str) -> None:
        """Note an answer that nobody was asked for."""
        self.strangers.append(Rejection(-1, "unknown-node", f"node {node}: {detail}"))
        LOG.warning("rejected node %d: unknown-node: %s", node, detail)


def judge(
    plan: RoundPlan,
    node: int,
    message: Message,
    signer: tuple[str, str] | None = None,
    layout: Layout | None = None,
    weighted_by_key: str = "num-examples",
) -> TrainReply | Rejection:
    """Check one reply against its plan, from the cheapest test to the decoder.

    ``signer`` is the name and public key of the client that must have signed it;
    ``weighted_by_key`` tells a second answer with another weight from the first.
    """
    if message.has_error():
        return Rejection(plan.client, *failure_of(message))
    content = message.content
    try:
        receipt = read_answer(content, Receipt)
        if receipt is None:
            raise UpdateError(
                "the reply holds no update; put dare_mod into ClientApp(mods=[dare_mod])",
                reason="mod",
            )
        if isinstance(receipt, Refusal):
            return Rejection(plan.client, receipt.reason, receipt.detail)
        receipt.check_answers(plan)
        blob = read_payload(content, UPDATE_KEY, most_payload(plan.spec(layout)))
        if blob is None:
            raise UpdateError("the reply holds no update payload", reason="truncated")
        dense_spec = plan.dense_spec()
        dense_limit = most_payload(dense_spec) if dense_spec else 0
        dense_blob = read_payload(content, DENSE_KEY, dense_limit)
        statistics = _read_statistics(plan, layout, content, receipt.statistics)
        statistics_blob = statistics.blob if statistics else b""
        if signer is not None:
            name, public = signer
            signed = reply_digest(
                plan.digest(), blob, dense_blob, metrics_of(content), statistics_blob
            )
            check_signature(public, signed, receipt.signature, name)
    except DareError as error:
        return Rejection(plan.client, error.reason, one_line(error))
    weight = min(1.0, plan.terms.max_weight)
    checked = check_reply(plan, blob, dense_blob, weight, statistics=statistics, layout=layout)
    if isinstance(checked, Rejection):
        return checked
    return TrainReply(
        node=node,
        accepted=checked,
        content=RecordDict(dict(own_records(content))),
        update_bytes=len(blob),
        dense_bytes=len(dense_blob or b""),
        statistics_bytes=len(statistics_blob),
        message_bytes=message_bytes(content),
        receipt=receipt,
        digest=_reply_digest(
            blob + statistics_blob,
            dense_blob,
            [record.get(weighted_by_key) for record in content.metric_records.values()],
        ),
    )


def _read_statistics(
    plan: RoundPlan, layout: Layout | None, content: RecordDict, names: tuple[str, ...]
) -> StatisticsUpdate | None:
    """Read the payload of statistics or directions where the plan asks for one."""
    if layout is None or not (plan.terms.statistics or plan.terms.directions):
        return None
    if plan.terms.directions:
        limit = most_bytes(plan.terms, layout)
    else:
        limit = most_payload(statistics_spec(plan, layout, names))
    blob = read_payload(content, STATISTICS_KEY, limit)
    return None if blob is None else StatisticsUpdate(blob, names)


def _payload_bytes(plan: RoundPlan, layout: Layout | None) -> int:
    """Most bytes that the payloads of a reply to this plan can have together."""
    specs = [plan.spec(layout), plan.dense_spec()]
    carried = 0
    if plan.terms.directions and layout is not None:
        carried = most_bytes(plan.terms, layout)
    if plan.terms.statistics and layout is not None:
        matrices = [entry.name for entry in layout.entries if len(entry.shape) == 2]
        specs.append(statistics_spec(plan, layout, matrices))
    return carried + sum(most_payload(spec) for spec in specs if spec is not None)


def metrics_and_weight(
    content: RecordDict, weighted_by_key: str, weighting: str
) -> tuple[MetricRecord, object]:
    """The app's metrics of a reply and what it says it weighs, not checked yet.

    Raises `UpdateError` (reason "weight") where replies weigh as they say and this says nothing.
    """
    records = [record for record in content.values() if isinstance(record, MetricRecord)]
    metrics = records[0] if len(records) == 1 else MetricRecord()
    if not WEIGHTINGS[weighting]:
        return metrics, 1.0
    if len(records) != 1 or weighted_by_key not in metrics:
        raise UpdateError(
            f"the reply has {len(records)} MetricRecords and no weight {weighted_by_key!r}; return "
            f"MetricRecord({{{weighted_by_key!r}: number of examples}}) or set weighting='equal'",
            reason="weight",
        )
    return metrics, metrics[weighted_by_key]


def _reply_digest(blob: bytes, dense_blob: bytes | None, weight: object) -> bytes:
    digest = hashlib.sha256(blob)
    digest.update(dense_blob or b"")
    digest.update(repr(weight).encode())
    return digest.digest()
