"""A federated round without a network: the client's half and the server's half.

The Flower strategy and mod call these functions, and so does any in-process simulation, so
both run the same round::

    plans = make_plans(secret, 1, [None] * n, settings.plan_settings(), model.ref)
    update = make_client_update(plans[i], base_arrays, tuned_arrays)          # on each client
    reply = check_reply(plans[i], update.blob, update.dense_blob, weight)     # on the server
    merged = merge_round(model, accepted, settings)
    model, state = advance(model, state, merged, settings)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import DropRate, parse_drop_rate
from dare_agg.codec.update import Update, decode_update, encode_update
from dare_agg.downlink.protocol import Downlink, DrawnMask, FullDownlink
from dare_agg.errors import (
    BaseMismatchError,
    ConfigError,
    DareError,
    LayoutError,
    MergeError,
    UpdateError,
    did_you_mean,
)
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.methods import find_method
from dare_agg.merge.sources import DeltaSource
from dare_agg.rounds.plan import PlanSettings, RoundPlan
from dare_agg.rounds.same_code import check_same_code
from dare_agg.rounds.statistics import (
    GramMatrices,
    Statistics,
    StatisticsUpdate,
    decode_statistics,
    encode_statistics,
)
from dare_agg.rounds.step import ServerStep, StepState, server_step
from dare_agg.vectors.layout import FloatVector, Layout, check_finite, compile_patterns, matches
from dare_agg.vectors.model import Arrays, GlobalModel, ModelRef, global_model

# Merge methods of a round, with the options it sets. Fisher and RegMean have the clients send
# statistics along. TIES: no trim (DARE has dropped already), and the expected count, whose result
# does not grow with 1/(1-p) from round to round.
FEDERATED_METHODS: Mapping[str, Mapping[str, Any]] = {
    "average": {},
    "task-arithmetic": {},
    "ties": {"trim": 0.0, "normalize": "expected"},
    "fisher": {},
    "regmean": {},
}
WEIGHTINGS = ("examples", "equal")
MASKS = ("stratified", "bernoulli")
# Rotated formats blur neighbours and may turn a small positive value negative.
STATISTICS_VALUES = ("f32", "bf16")


@dataclass(frozen=True)
class FederatedSettings:
    """What a federated run is set to; checked when made.

    Attributes
    ----------
    method: merge method, a row of `FEDERATED_METHODS`. Weights are normalised to sum 1, so
        "task-arithmetic" with scaling 1 is the weighted mean.
    scaling: λ, the factor on the merged delta.
    drop_rate, values, mask: of the delta group's updates.
    dense, exclude: patterns of the dense and the local tensors.
    dense_values: value format of the dense group.
    weighting: "examples" (by the number each client reports) or "equal".
    step: what the server does with the merged delta.
    options: further options of the merge method.
    max_weight: largest number of examples a client may claim.
    rescale: False sends unscaled survivors (error feedback needs it).
    shared_mask: all clients of a round use one mask (secure sums need it; fisher sets it, so
        that every client's Fisher value of a survivor is known).
    statistics_values: value format of the statistics that fisher and regmean need.
    """

    method: str = "task-arithmetic"
    scaling: float = 1.0
    drop_rate: DropRate | float | str = "0.9"
    values: str = "b1"
    mask: str = "stratified"
    dense: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dense_values: str = "f16"
    weighting: str = "examples"
    step: ServerStep = field(default_factory=server_step)
    options: Mapping[str, Any] = field(default_factory=dict)
    max_weight: float = 1e7
    rescale: bool = True
    shared_mask: bool = False
    statistics_values: str = "bf16"
    tile: int = 1 << 16
    threads: int = 1

    def __post_init__(self) -> None:
        _check_choice("merge method", self.method, FEDERATED_METHODS)
        _check_choice("value format", self.values, VALUE_FORMATS)
        _check_choice("value format of the dense group", self.dense_values, VALUE_FORMATS)
        _check_choice("value format of the statistics", self.statistics_values, STATISTICS_VALUES)
        _check_choice("mask", self.mask, MASKS)
        _check_choice("weighting", self.weighting, WEIGHTINGS)
        if not isinstance(self.drop_rate, DropRate):
            object.__setattr__(self, "drop_rate", parse_drop_rate(self.drop_rate))
        for name in ("scaling", "max_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} = {value!r}; a number is needed")
            if not math.isfinite(value) or value <= 0:
                raise ConfigError(f"{name} = {value}; it must be finite and above 0")
        for name in ("dense", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"{name} = {value!r}; a list of patterns is needed: [{value!r}]")
            object.__setattr__(self, name, tuple(value))

    @property
    def statistics(self) -> str:
        """Kind of statistics the merge method needs: "fisher", "gram" or ""."""
        return find_method(self.method).statistics or ""

    def plan_settings(self) -> PlanSettings:
        """The part of the settings that round plans carry."""
        assert isinstance(self.drop_rate, DropRate)
        return PlanSettings(
            drop_rate=self.drop_rate,
            values=self.values,
            mask=self.mask,
            dense_values=self.dense_values,
            max_weight=float(self.max_weight),
            rescale=self.rescale,
            shared_mask=self.shared_mask or self.statistics == "fisher",
            dense=self.dense,
            exclude=self.exclude,
            statistics=self.statistics,
            statistics_values=self.statistics_values if self.statistics else "",
        )


def _check_choice(what: str, value: object, known: Any) -> None:
    if value not in tuple(known):
        raise ConfigError(f"{what} {value!r} is unknown{did_you_mean(str(value), known)}")


# --- the client's half ---------------------------------------------------------------------


@dataclass(frozen=True)
class ClientUpdate:
    """One client's answer to a plan, and what it measured of its own full delta."""

    blob: bytes
    dense_blob: bytes | None
    delta_norm: float
    delta_max: float
    share_above: float  # of |delta| > 0.005, the range in which DARE is safe
    statistics: StatisticsUpdate | None = None

    @property
    def nbytes(self) -> int:
        statistics = self.statistics.blob if self.statistics else b""
        return len(self.blob) + len(self.dense_blob or b"") + len(statistics)


def make_client_update(
    plan: RoundPlan, base: Arrays, tuned: Arrays, statistics: Statistics | None = None
) -> ClientUpdate:
    """Turn trained arrays (and statistics of them) into the update the plan asks for.

    ``base`` are the arrays the training started from, ``tuned`` what it returned; tensors
    that are local by the plan's patterns may be missing in ``tuned`` and are ignored.

    Raises `UpdateError` for a plan of another codec or package, `BaseMismatchError` when
    ``base`` is not the state the plan names, `LayoutError` for missing or reshaped tensors,
    `NonFiniteError` when training produced a NaN or an infinity.
    """
    check_same_code(plan.codec, plan.package, "the round plan", "this client")
    model = model_of_plan(plan, base)
    groups = model.groups
    patterns = compile_patterns(plan.exclude)
    known = set(groups.names)
    strangers = sorted(n for n in tuned if n not in known and not matches(n, patterns))
    if strangers:
        raise LayoutError(
            f"training returned {len(strangers)} tensors the global model does not have "
            f"({strangers[0]!r}, …); name them in 'exclude' if they are local"
        )
    tuned_delta = groups.layout.flatten(tuned)
    check_finite(groups.layout, tuned_delta, "after training")
    norm, largest, above = _measure(model.delta, tuned_delta)
    blob = encode_update(plan.spec(), (model.delta, tuned_delta))
    dense_spec, dense_blob = plan.dense_spec(), None
    if dense_spec is not None:
        tuned_dense = groups.dense_layout.flatten(tuned)
        check_finite(groups.dense_layout, tuned_dense, "after training")
        dense_blob = encode_update(dense_spec, (model.dense, tuned_dense))
    encoded = encode_statistics(plan, groups.layout, statistics or {}) if plan.statistics else None
    return ClientUpdate(blob, dense_blob, norm, largest, above, encoded)


def model_of_plan(plan: RoundPlan, arrays: Arrays) -> GlobalModel:
    """Read ``arrays`` as the state of the global model that the plan names, and check it.

    Raises `LayoutError` (other tensors) or `BaseMismatchError` (other values).
    """
    model = global_model(arrays, dense=plan.dense, exclude=plan.exclude)
    for what, ours, asked in (
        ("delta", model.groups.layout.fingerprint, plan.model.layout),
        ("dense", model.ref.dense_layout, plan.model.dense_layout),
    ):
        if ours != asked:
            raise LayoutError(
                f"the {what} group has layout {ours[:12]}, the plan asks for {asked[:12]}; the "
                "client's model has other names or shapes than the server's"
            )
    for what, ours, asked in (
        ("delta", model.ref.base, plan.model.base),
        ("dense", model.ref.dense_base, plan.model.dense_base),
    ):
        if ours != asked:
            raise BaseMismatchError(
                f"the {what} group has fingerprint {ours[:12]}, the plan asks for base "
                f"{asked[:12]}; fetch the global model again"
            )
    return model


def _measure(base: FloatVector, tuned: FloatVector) -> tuple[float, float, float]:
    squares, largest, above = 0.0, 0.0, 0
    for lo in range(0, base.size, 1 << 16):
        piece = np.abs(tuned[lo : lo + (1 << 16)] - base[lo : lo + (1 << 16)])
        squares += float(np.sum(piece * piece, dtype=np.float64))
        largest = max(largest, float(piece.max()))
        above += int(np.count_nonzero(piece > np.float32(0.005)))
    return math.sqrt(squares), largest, above / base.size


# --- the server's half ---------------------------------------------------------------------


@dataclass(frozen=True)
class Accepted:
    """A checked reply: decodable, finite, of this plan."""

    plan: RoundPlan
    update: Update
    dense: Update | None
    weight: float
    statistics: DeltaSource | GramMatrices | None = None


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

    ``layout``, the delta group's, is needed where the plan asks for statistics.
    """
    try:
        checked = check_weight(weight, plan.max_weight)
        update = decode_update(blob, plan.spec())
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
        found = None
        if plan.statistics:
            if statistics is None or layout is None:
                raise UpdateError(f"the {plan.statistics} values are missing", reason="statistics")
            found = decode_statistics(plan, layout, statistics)
    except DareError as error:
        return Rejection(plan.client, error.reason, str(error))
    return Accepted(plan, update, dense, checked, found)


def check_weight(weight: object, max_weight: float) -> float:
    """Return the weight as a float; raises `UpdateError` (reason "weight") for an absurd one."""
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise UpdateError(
            f"weight {weight!r} is a {type(weight).__name__}; a number of examples is needed",
            reason="weight",
        )
    # Compared before the conversion: a huge integer would overflow it.
    if not (0 < weight <= max_weight):
        raise UpdateError(
            f"weight {weight!r} is outside (0, {max_weight:g}]; raise max_weight if it is real",
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
    if weighting == "equal":
        return tuple(1.0 / len(accepted) for _ in accepted)
    total = math.fsum(reply.weight for reply in accepted)
    return tuple(reply.weight / total for reply in accepted)


def merge_round(
    model: GlobalModel, accepted: Sequence[Accepted], settings: FederatedSettings
) -> MergedRound:
    """Merge the accepted updates of a round, in the order of the plans.

    The order in which they arrived does not matter. Every update is unbiased by itself, so
    clients with different drop rates and value formats mix without correction.
    """
    if not accepted:
        raise MergeError("no update was accepted; there is nothing to merge")
    ordered = sorted(accepted, key=lambda reply: reply.plan.client)
    weights = round_weights(ordered, settings.weighting)
    delta, measured = merge_deltas(
        model.groups.layout,
        [reply.update for reply in ordered],
        settings.method,
        weights=weights,
        scaling=settings.scaling,
        options={**FEDERATED_METHODS[settings.method], **settings.options},
        tile=settings.tile,
        threads=settings.threads,
        keep=[reply.plan.drop_rate.keep for reply in ordered],
        statistics=_statistics(ordered, settings),
    )
    dense = None
    dense_updates = [reply.dense for reply in ordered if reply.dense is not None]
    if dense_updates:
        dense, _ = merge_deltas(
            model.groups.dense_layout,
            dense_updates,
            "task-arithmetic",
            weights=weights,
            tile=settings.tile,
            threads=settings.threads,
        )
    measurements = {
        "accepted": len(ordered),
        "weights": list(weights),
        "survivors": [reply.update.survivors for reply in ordered],
        "survivors_per_element": math.fsum(reply.plan.drop_rate.keep for reply in ordered),
        "merged_norm": _norm(delta),
        "merge": asdict(measured),
    }
    return MergedRound(delta, dense, weights, measurements)


def _statistics(
    ordered: Sequence[Accepted], settings: FederatedSettings
) -> list[DeltaSource | GramMatrices]:
    """The statistics of a round's updates; Fisher values must be of the same elements."""
    if not settings.statistics:
        return []
    first = ordered[0].plan
    if settings.statistics == "fisher":
        for reply in ordered:
            plan = reply.plan
            if (plan.mask_key, plan.rank) != (first.mask_key, first.rank):
                raise MergeError(
                    f"clients {first.client} and {plan.client} have other masks; fisher needs one "
                    "drop rate for all clients of a round"
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
    next_state, step = settings.step.apply(state, merged.delta)
    check_finite(model.groups.layout, step, "server step")
    carrier = downlink or FullDownlink()
    return carrier.advance(model, step, merged.dense, plans), next_state


def _norm(vector: FloatVector) -> float:
    squares = math.fsum(
        float(np.sum(np.square(vector[lo : lo + (1 << 16)]), dtype=np.float64))
        for lo in range(0, vector.size, 1 << 16)
    )
    return math.sqrt(squares)


__all__ = [
    "FEDERATED_METHODS",
    "Accepted",
    "ClientUpdate",
    "FederatedSettings",
    "MergedRound",
    "ModelRef",
    "Rejection",
    "StatisticsUpdate",
    "advance",
    "check_reply",
    "check_weight",
    "make_client_update",
    "merge_round",
    "model_of_plan",
    "round_weights",
]
