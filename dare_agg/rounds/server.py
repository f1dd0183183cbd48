"""The server's half of a round: replies checked, merged, and the model moved by the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dare_agg.codec.fitted_rates import tensor_squares
from dare_agg.codec.payload import payload_bytes
from dare_agg.codec.update import UpdateSpec, decode_update
from dare_agg.downlink.protocol import Downlink, DrawnMask, FullDownlink
from dare_agg.errors import (
    DareError,
    MergeError,
    UpdateError,
)
from dare_agg.merge.engine import MergeMeasurements, merge_deltas
from dare_agg.merge.methods import MEAN
from dare_agg.rounds.directions import decode_round_directions
from dare_agg.rounds.levels import levels_told
from dare_agg.rounds.noise import norm_of
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.settings import WEIGHTINGS, FederatedSettings
from dare_agg.rounds.statistics import (
    GramMatrices,
    StatisticsUpdate,
    decode_statistics,
)
from dare_agg.rounds.step import StepState
from dare_agg.vectors.layout import FloatVector, Layout, check_finite
from dare_agg.vectors.model import GlobalModel
from dare_agg.vectors.sources import DeltaSource, survivors_of

# Header, checksum and block scales' slack; the decoder checks the exact length.
_HEADER_ROOM = 1024


@dataclass(frozen=True)
class Accepted:
    """A checked reply: decodable, finite, of this plan.

    Steps before the merge (`dare_agg.rounds.chain`) may put other deltas in its place, or one
    for several clients: ``others`` are then the plans of the others, in their order.
    """

    plan: RoundPlan
    update: DeltaSource
    dense: DeltaSource | None
    weight: float
    statistics: DeltaSource | GramMatrices | Mapping[str, FloatVector] | None = None
    others: tuple[RoundPlan, ...] = ()

    @property
    def plans(self) -> tuple[RoundPlan, ...]:
        """The plans of all clients whose deltas are in it."""
        return (self.plan, *self.others)

    @property
    def keep(self) -> float:
        """Survivors of an element, n(1−p)."""
        return math.fsum(plan.keep for plan in self.plans)


@dataclass(frozen=True)
class Rejection:
    """Why a client's reply does not count. ``reason`` is a slug, ``detail`` one line."""

    client: int
    reason: str
    detail: str


def check_reply(
    plan: RoundPlan,
    blob: bytes,
    dense_blob: bytes | None,
    weight: object,
    *,
    statistics: StatisticsUpdate | None = None,
    layout: Layout | None = None,
) -> Accepted | Rejection:
    """Check one client's reply against its plan; a bad one becomes a `Rejection`.

    ``layout``, the delta group's, is needed where the plan asks for statistics, directions, or keep
    rates by tensor.
    """
    try:
        checked = check_weight(weight, plan.terms.max_weight)
        update = decode_update(blob, plan.spec(layout))
        plan = replace(plan, rates=update.spec.rates)
        dense_spec, dense = plan.dense_spec(), None
        if dense_spec is None and dense_blob:
            raise UpdateError(
                f"{len(dense_blob)} bytes for a dense group that the plan does not have",
                reason="trailing",
            )
        if dense_spec is not None:
            if dense_blob is None:
                raise UpdateError("the dense group's update is missing", reason="truncated")
            dense = decode_update(dense_blob, dense_spec)
        found: DeltaSource | GramMatrices | Mapping[str, FloatVector] | None = None
        if plan.terms.directions:
            if statistics is None or layout is None:
                raise UpdateError("the directions are missing", reason="directions")
            found = decode_round_directions(plan, layout, statistics.blob)
        if plan.terms.statistics:
            if statistics is None or layout is None:
                raise UpdateError(
                    f"the {plan.terms.statistics} values are missing", reason="statistics"
                )
            found = decode_statistics(plan, layout, statistics)
    except DareError as error:
        return Rejection(plan.client, error.reason, str(error))
    return Accepted(plan, update, dense, checked, found)


def most_payload(spec: UpdateSpec) -> int:
    """Most bytes a payload of this specification can have, known before it arrives."""
    return payload_bytes(spec.values, spec.most_survivors) + spec.table_bytes + _HEADER_ROOM


def check_weight(weight: object, max_weight: float) -> float:
    """Return the weight as a float.

    Raises `UpdateError` for one that does not count: reason "no-examples" for 0, which is what
    a client without data reports, "weight" for an absurd one.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise UpdateError(
            f"weight {weight!r} is a {type(weight).__name__}; a number of examples is needed",
            reason="weight",
        )
    if weight == 0:
        raise UpdateError(
            "it reports 0 examples, and counts for nothing as in FedAvg; give it data, or set "
            "weighting='equal' where the number is none of examples",
            reason="no-examples",
        )
    if not 0 < weight < math.inf:
        raise UpdateError(
            f"weight {weight!r} is no number of examples; report how many it trained on",
            reason="weight",
        )
    # Compared before the conversion: a huge integer would overflow it.
    if weight > max_weight:
        raise UpdateError(
            f"weight {weight!r} is above {max_weight:.16g}; raise max_weight if it is real",
            reason="weight",
        )
    return float(weight)


@dataclass(frozen=True)
class MergedRound:
    """The merged deltas of a round and what was measured on the way."""

    delta: FloatVector
    dense: FloatVector | None
    weights: tuple[float, ...]
    measurements: dict[str, Any]


def round_weights(accepted: Sequence[Accepted], weighting: str) -> tuple[float, ...]:
    """Merging weights, summing to 1, in the order of ``accepted``."""
    reported = WEIGHTINGS[weighting]
    numbers = [reply.weight if reported else len(reply.plans) for reply in accepted]
    total = math.fsum(numbers)
    return tuple(number / total for number in numbers)


def merge_round(
    model: GlobalModel, accepted: Sequence[Accepted], settings: FederatedSettings
) -> MergedRound:
    """Merge the accepted updates of a round, in the order of the plans.

    The order in which they arrived does not matter. Every update is unbiased by itself, so
    clients with different drop rates and value formats are merged as they are.

    Raises `MergeError` where no update was accepted.
    """
    ordered, weights = merging_order(accepted, settings)
    delta, measured = merge_deltas(
        model.groups.layout,
        [reply.update for reply in ordered],
        settings.method,
        **merging_words(ordered, weights, settings),
    )
    dense = merge_dense_group(model, ordered, weights, settings)
    measurements = round_measured(ordered, weights, norm_of(delta), measured)
    return MergedRound(delta, dense, weights, measurements)


def merging_order(
    accepted: Sequence[Accepted], settings: FederatedSettings
) -> tuple[list[Accepted], tuple[float, ...]]:
    """The updates in the order in which they are merged, and their weights.

    Raises `MergeError` for none.
    """
    if not accepted:
        raise MergeError("no update was accepted; there is nothing to merge")
    ordered = sorted(accepted, key=lambda reply: reply.plan.client)
    return ordered, round_weights(ordered, settings.weighting)


def merging_words(
    ordered: Sequence[Accepted], weights: Sequence[float], settings: FederatedSettings
) -> dict[str, Any]:
    """What `merge_deltas` is told of a round besides the deltas."""
    return {
        "weights": weights,
        "scaling": settings.scaling,
        "options": {**(settings.row.federated or {}), **settings.options},
        "tile": settings.tile,
        "threads": settings.threads,
        "keep": [reply.keep for reply in ordered],
        "statistics": _statistics(ordered, settings),
    }


def merge_dense_group(
    model: GlobalModel,
    ordered: Sequence[Accepted],
    weights: Sequence[float],
    settings: FederatedSettings,
) -> FloatVector | None:
    """The mean of the dense groups, None where there is none."""
    updates = [reply.dense for reply in ordered if reply.dense is not None]
    if not updates:
        return None
    return merge_deltas(
        model.groups.dense_layout,
        updates,
        MEAN,
        weights=weights,
        tile=settings.tile,
        threads=settings.threads,
    )[0]


def round_measured(
    ordered: Sequence[Accepted],
    weights: Sequence[float],
    norm: float,
    measured: MergeMeasurements,
) -> dict[str, Any]:
    """What a round's merge measured, for logs and reports."""
    return {
        "accepted": sum(len(reply.plans) for reply in ordered),
        "weights": list(weights),
        "survivors": [survivors_of(reply.update) for reply in ordered],
        "survivors_per_element": math.fsum(reply.keep for reply in ordered),
        "merged_norm": norm,
        "merge": asdict(measured),
    }


def _statistics(
    ordered: Sequence[Accepted], settings: FederatedSettings
) -> list[DeltaSource | GramMatrices | Mapping[str, FloatVector]]:
    """The statistics of a round's updates, of the same elements where the method needs that."""
    if not settings.terms.statistics and not settings.terms.directions:
        return []
    first = ordered[0].plan
    if settings.row.shared_mask:
        for reply in ordered:
            plan = reply.plan
            if (plan.mask_key, plan.rank) != (first.mask_key, first.rank):
                raise MergeError(
                    f"clients {first.client} and {plan.client} have other masks; "
                    f"{settings.method} needs one drop rate for all clients of a round"
                )
    return [reply.statistics for reply in ordered if reply.statistics is not None]


def advance(
    model: GlobalModel,
    state: StepState,
    merged: MergedRound,
    settings: FederatedSettings,
    downlink: Downlink | None = None,
    plans: Sequence[DrawnMask] = (),
) -> tuple[GlobalModel, StepState]:
    """Apply the server step to the delta group and the mean to the dense group.

    ``downlink`` decides what becomes of the step (it may round it); ``plans`` are those of
    the merged updates, for a downlink that draws their masks again.
    """
    next_state, step = settings.server_step.apply(state, merged.delta)
    sizes = model.groups.layout.sizes
    if settings.terms.keep_rates == "last":
        levels = levels_told(sizes, tensor_squares(sizes, merged.delta), plans)
        next_state = replace(next_state, levels=levels)
    check_finite(model.groups.layout, step, "server step")
    carrier = downlink or FullDownlink()
    return carrier.advance(model, step, merged.dense, plans), next_state
