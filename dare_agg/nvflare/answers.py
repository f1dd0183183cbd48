"""Judging the answer of one site: an update with its receipt, or a reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dare_agg.errors import UpdateError
from dare_agg.rounds.directions import most_bytes
from dare_agg.rounds.messages import Receipt, Refusal
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.server import Accepted, Rejection, check_reply, most_payload
from dare_agg.rounds.settings import WEIGHTINGS
from dare_agg.rounds.statistics import StatisticsUpdate
from dare_agg.vectors.layout import Layout

# Payloads of an answer.
UPDATE, DENSE, DIRECTIONS = "update", "dense", "directions"


@dataclass(frozen=True)
class Answered:
    """A site's accepted update and what it measured of its own change."""

    accepted: Accepted
    receipt: Receipt
    update_bytes: int
    dense_bytes: int
    metrics: Mapping[str, Any]


def judge(
    plan: RoundPlan,
    layout: Layout,
    weighting: str,
    record: Mapping[str, Any] | None,
    payloads: Mapping[str, Any],
    weight: object,
    metrics: Mapping[str, Any],
) -> Answered | Rejection:
    """Check one site's answer to its plan, from the cheapest test to the decoder.

    ``layout`` is the delta group's; ``record`` the receipt or refusal, None where there is none.
    Nothing in them is trusted. Raises `DareError` for what cannot count, too.
    """
    if record is None:
        raise UpdateError(
            "the reply holds whole weights or nothing of an update; put DareFilter into the "
            "site's filters of incoming tasks and of results (DareRecipe does)",
            reason="mod",
        )
    refusal = Refusal.read(record)
    if refusal is not None:
        return Rejection(plan.client, refusal.reason, refusal.detail)
    receipt = Receipt.read(record)
    receipt.check_answers(plan)
    dense_spec = plan.dense_spec()
    blob = _payload(payloads, UPDATE, most_payload(plan.spec(layout)))
    if blob is None:
        raise UpdateError("the reply holds no update payload", reason="truncated")
    dense = _payload(payloads, DENSE, most_payload(dense_spec) if dense_spec else 0)
    statistics = None
    if plan.terms.directions:
        found = _payload(payloads, DIRECTIONS, most_bytes(plan.terms, layout))
        statistics = None if found is None else StatisticsUpdate(found)
    if not WEIGHTINGS[weighting]:
        weight = 1.0
    checked = check_reply(plan, blob, dense, weight, statistics=statistics, layout=layout)
    if isinstance(checked, Rejection):
        return checked
    return Answered(checked, receipt, len(blob), len(dense or b""), metrics)


def _payload(payloads: Mapping[str, Any], name: str, limit: int) -> bytes | None:
    """A payload of an answer, None where there is none; raises `UpdateError` for another kind."""
    found = payloads.get(name)
    if found is None:
        return None
    if not isinstance(found, bytes):
        raise UpdateError(
            f"payload {name!r} is a {type(found).__name__}; bytes are needed", reason="transport"
        )
    if len(found) > limit:
        raise UpdateError(
            f"payload {name!r} has {len(found)} bytes, the plan allows {limit}", reason="oversized"
        )
    return found
