"""What a round of a Flower strategy leaves behind."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from flwr.app import ArrayRecord, MetricRecord

from dare_agg.flower.lazy import record_of
from dare_agg.flower.replies import TrainReply
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.server import Rejection
from dare_agg.rounds.step import StepState
from dare_agg.vectors.model import GlobalModel


@dataclass(frozen=True)
class RoundOutcome:
    """Everything about a finished round: for checkpoints, measurements, early stopping."""

    round: int
    model: GlobalModel
    step_state: StepState
    measurements: dict[str, Any]
    rejections: Sequence[Rejection]
    plans: Sequence[RoundPlan]
    train_metrics: MetricRecord | None = None
    client_metrics: MetricRecord | None = None
    server_metrics: MetricRecord | None = None

    @cached_property
    def arrays(self) -> ArrayRecord:
        """The global model after the round."""
        return record_of(self.model)


@dataclass(frozen=True)
class Asked:
    """Who was asked to train for a round, beside what they answered.

    ``names`` are those of the clients by their plans' ``client``, ``download`` the bytes of each
    message that was sent.
    """

    round: int
    started: float
    names: Mapping[int, str]
    download: Sequence[int]
    duplicates: int = 0


def round_measurements(
    asked: Asked,
    replies: Sequence[TrainReply],
    rejections: Sequence[Rejection],
    merged: Mapping[str, Any],
) -> dict[str, Any]:
    """What a round measured, as plain values; lists follow the accepted clients' order.

    ``update_bytes`` and ``dense_bytes`` are the encoded payloads, ``upload_bytes`` and
    ``download_bytes`` the whole messages around them. ``weights_cut`` names who claimed more
    than the round's bound, ``robust`` by which rule the round was merged, if by one, and who was
    hardly heard.
    """
    names = asked.names
    cut = [c for of_step in merged.get("steps", ()) for c in of_step.get("weights_cut", ())]
    return {
        "round": asked.round,
        "seconds": time.monotonic() - asked.started,
        "sampled": len(asked.download),
        "accepted": len(replies),
        "clients": [names[reply.accepted.plan.client] for reply in replies],
        "update_bytes": [reply.update_bytes for reply in replies],
        "dense_bytes": [reply.dense_bytes for reply in replies],
        "statistics_bytes": [reply.statistics_bytes for reply in replies],
        "upload_bytes": [reply.message_bytes for reply in replies],
        "download_bytes": list(asked.download),
        "examples": [reply.accepted.weight for reply in replies],
        "drop_rates": [_dropped(reply.accepted.plan) for reply in replies],
        "values": [reply.accepted.plan.terms.values for reply in replies],
        "delta_norms": [reply.receipt.delta_norm for reply in replies],
        "delta_max": [reply.receipt.delta_max for reply in replies],
        "share_above": [reply.receipt.share_above for reply in replies],
        "duplicates": asked.duplicates,
        "rejected": [{**asdict(r), "name": names.get(r.client, "")} for r in rejections],
        **merged,
        "weights_cut": [names.get(client, "") for client in cut],
        **_robust(merged, names),
    }


def _robust(merged: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """What a robust rule did, with the names of those of whom it took less than half a share."""
    for of_step in merged.get("steps", ()):
        if (found := of_step.get("robust")) is None:
            continue
        heard = found.get("shares", found["factors"])
        usual = 0.5 * sum(heard) / len(heard)
        unheard = [
            names.get(client, "")
            for client, share in zip(found["clients"], heard, strict=True)
            if share < usual
        ]
        told = {name: found[name] for name in ("rule", "byzantine", "shared_mask")}
        return {"robust": {**told, "unheard": unheard}}
    return {}


def _dropped(plan: RoundPlan) -> float:
    """The share of a client's change that was dropped, of all tensors together."""
    return plan.drop_rate.p if plan.rates is None else 1 - plan.keep
