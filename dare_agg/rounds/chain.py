"""What stands between checking replies and merging them: a chain of pure steps.

A step takes the accepted updates of a round, in the order of their clients, and a context,
and returns those that go on. A *screen* leaves some out (`reject`), a *bound* limits what one
client can do (`scaled`), a *pre-aggregate* makes fewer of many (`pooled`)::

    def at_most(norm: float) -> UpdateStep:
        def step(accepted, context):
            factors = [min(1.0, norm / norm_of(reply.update)) for reply in accepted]
            bounded = map(scaled, accepted, factors)
            return Passed(tuple(bounded), measurements=({"bounded": sum(f < 1 for f in factors)},))
        return step

    passed = chain(at_most(1.0), drop_outliers)(accepted, context)
    merged = merge_round(model, passed.accepted, settings)

Steps read deltas tile by tile and keep nothing from round to round by themselves: momenta of
clients come in with the context and go out with what passed. What they draw at random comes from
the context's key. So a round gives the same bits in whatever order replies came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dare_agg.codec.derive import derive_key
from dare_agg.errors import REASONS, ConfigError, MergeError, did_you_mean
from dare_agg.merge.wrapped import FactorSource, SumSource
from dare_agg.robust.momentum import Momentum
from dare_agg.rounds.server import Accepted, Rejection
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.vectors.model import GlobalModel


@dataclass(frozen=True)
class StepContext:
    """What a step may know: the model the updates are of, the settings, the round's number.

    ``key`` (32 bytes) is known to no client, and each step of a chain gets its own. ``names`` are
    those of the clients, by their place in the round, and ``momenta`` what the rounds before left
    of each name.
    """

    model: GlobalModel
    settings: FederatedSettings
    round: int
    key: bytes
    names: Mapping[int, str] = field(default_factory=dict)
    momenta: Mapping[str, Momentum] = field(default_factory=dict)


@dataclass(frozen=True)
class Passed:
    """What a step or a chain lets through, whom it rejects, and what each step measured.

    ``momenta`` are those of the round's clients after it, by name; others stay as they were.
    """

    accepted: tuple[Accepted, ...]
    rejections: tuple[Rejection, ...] = ()
    measurements: tuple[Mapping[str, Any], ...] = ()
    momenta: Mapping[str, Momentum] = field(default_factory=dict)


UpdateStep = Callable[[Sequence[Accepted], StepContext], Passed]


def chain(*steps: UpdateStep) -> UpdateStep:
    """Compose steps into one; without any, all updates pass as they are.

    A step that leaves nobody is the last. The composed step raises `ConfigError` for a
    rejection whose reason is no row of `REASONS`, `MergeError` for a step that loses an update
    without rejecting its clients, or makes one up.
    """

    def run(accepted: Sequence[Accepted], context: StepContext) -> Passed:
        left = tuple(sorted(accepted, key=lambda reply: reply.plan.client))
        rejections: list[Rejection] = []
        measurements: list[Mapping[str, Any]] = []
        momenta: dict[str, Momentum] = {}
        for place, step in enumerate(steps):
            if not left:
                break
            own = replace(context, key=derive_key(context.key, "step", place, length=32))
            passed = step(left, own)
            _check(left, passed)
            left = passed.accepted
            rejections += passed.rejections
            measurements += passed.measurements
            momenta.update(passed.momenta)
        return Passed(left, tuple(rejections), tuple(measurements), momenta)

    return run


def reject(reply: Accepted, detail: str, reason: str = "outlier") -> tuple[Rejection, ...]:
    """Reject all the clients of an update, with one line on why."""
    return tuple(Rejection(plan.client, reason, detail) for plan in reply.plans)


def scaled(reply: Accepted, factor: float) -> Accepted:
    """The reply with its delta and its dense group times ``factor``; its weight stays."""
    if factor == 1:
        return reply
    dense = None if reply.dense is None else FactorSource(reply.dense, factor)
    return replace(reply, update=FactorSource(reply.update, factor), dense=dense)


def pooled(replies: Sequence[Accepted], shares: Sequence[float]) -> Accepted:
    """One reply for several: Σ share·delta of all their clients, weighing as much as they did.

    Raises `MergeError` for none, and where they carry statistics, which belong to one client.
    """
    if not replies or any(reply.statistics is not None for reply in replies):
        raise MergeError(
            f"{len(replies)} replies cannot be pooled: at least one is needed, and none that "
            "carries statistics; merge by a method that needs none"
        )
    dense = [reply.dense for reply in replies if reply.dense is not None]
    plans = sorted((plan for reply in replies for plan in reply.plans), key=lambda p: p.client)
    return Accepted(
        plan=plans[0],
        update=SumSource([reply.update for reply in replies], shares),
        dense=SumSource(dense, shares) if dense else None,
        weight=sum(reply.weight for reply in replies),
        others=tuple(plans[1:]),
    )


def _check(given: Sequence[Accepted], passed: Passed) -> None:
    for rejection in passed.rejections:
        if rejection.reason not in REASONS:
            raise ConfigError(
                f"a step rejects with reason {rejection.reason!r}"
                f"{did_you_mean(rejection.reason, REASONS)}"
            )
    before = sorted(plan.client for reply in given for plan in reply.plans)
    kept = [plan.client for reply in passed.accepted for plan in reply.plans]
    after = sorted([*kept, *(rejection.client for rejection in passed.rejections)])
    if before != after:
        raise MergeError(
            f"a step was given the clients {before} and accounts for {after}; it must pass, pool "
            "or reject each of them once"
        )
