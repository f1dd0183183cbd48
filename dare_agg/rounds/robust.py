"""The step before the merge that bears Byzantine clients: a rule of `dare_agg.robust` in a round.

Of all accepted updates one is made, which is then merged by itself. The dense group (heads, running
statistics) goes through the same rule by itself, without bounds where the rule needs none, and
without momentum: no drop makes it noisy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dare_agg.errors import ConfigError, MergeError
from dare_agg.merge.wrapped import FactorSource
from dare_agg.robust.aggregate import aggregate, bounded
from dare_agg.robust.momentum import Momentum
from dare_agg.robust.rule import RobustRule
from dare_agg.rounds.chain import Passed, StepContext, UpdateStep, reject
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.server import Accepted
from dare_agg.rounds.settings import WEIGHTINGS

_DIGITS = 6


def robust_step(rule: RobustRule) -> UpdateStep:
    """The step: one update of all, or the updates bounded where the rule does nothing but bound.

    Fewer updates than the rule needs are rejected, with reason "quorum". It measures ``robust``:
    the rule, the clients, what the bounds left of each of them and how much of each is in what the
    rule voted on. Raises `ConfigError` for clients of other drop rates where the rule compares
    them, and `MergeError` for statistics, which no rule reads.
    """

    def step(accepted: Sequence[Accepted], context: StepContext) -> Passed:
        if len(accepted) < rule.least:
            why = f"{len(accepted)} updates, {str(rule)!r} bears {rule.byzantine} Byzantine of "
            why += f"{rule.least} or more"
            left = [one for reply in accepted for one in reject(reply, why, reason="quorum")]
            return Passed((), tuple(left))
        counted = WEIGHTINGS[context.settings.weighting]
        weights = [reply.weight if counted else 1.0 for reply in accepted]
        work = _bounded if rule.bounds_only else _pooled
        passed, measured, momenta = work(accepted, weights, rule, context)
        told = {
            "rule": str(rule),
            "byzantine": rule.byzantine,
            "shared_mask": rule.votes,
            "clients": [reply.plan.client for reply in accepted],
            **{name: [round(one, _DIGITS) for one in of] for name, of in measured.items()},
        }
        return Passed(passed, measurements=({"robust": told},), momenta=momenta)

    return step


_Done = tuple[tuple[Accepted, ...], Mapping[str, Sequence[float]], Mapping[str, Momentum]]


def _bounded(
    accepted: Sequence[Accepted],
    weights: Sequence[float],
    rule: RobustRule,
    context: StepContext,
) -> _Done:
    found = bounded([reply.update for reply in accepted], weights, rule)
    dense = [reply.dense for reply in accepted if reply.dense is not None]
    of_dense = bounded(dense, weights, rule).factors if dense else (1.0,) * len(accepted)
    passed = tuple(
        replace(
            reply,
            update=reply.update if factor == 1 else FactorSource(reply.update, factor),
            dense=reply.dense and FactorSource(reply.dense, own),
            weight=weight if WEIGHTINGS[context.settings.weighting] else reply.weight,
        )
        for reply, factor, own, weight in zip(
            accepted, found.factors, of_dense, found.weights, strict=True
        )
    )
    return passed, {"norms": found.norms, "factors": found.factors}, {}


def _pooled(
    accepted: Sequence[Accepted],
    weights: Sequence[float],
    rule: RobustRule,
    context: StepContext,
) -> _Done:
    if any(reply.statistics is not None for reply in accepted):
        raise MergeError("robust rules read no statistics; merge by task-arithmetic")
    plans = sorted((p for reply in accepted for p in reply.plans), key=lambda p: p.client)
    if rule.votes:
        check_one_mask(plans)
    names = [context.names.get(reply.plan.client, str(reply.plan.client)) for reply in accepted]
    seed = np.frombuffer(context.key, np.uint32).tolist()
    # Who goes by a name that another client of the round has too has no past, and leaves none: else
    # one could put its own momentum in another's place.
    alone = {name for name, count in Counter(names).items() if count == 1}
    momenta = {name: one for name, one in context.momenta.items() if name in alone}
    before = [momenta.get(name) for name in names] if rule.beta else None
    merged = aggregate([reply.update for reply in accepted], weights, rule, seed, before)
    dense = [reply.dense for reply in accepted if reply.dense is not None]
    one = Accepted(
        plan=plans[0],
        update=merged.delta,
        dense=aggregate(dense, weights, rule.without_bounds(), seed).delta if dense else None,
        weight=sum(weights),
        others=tuple(plans[1:]),
    )
    moved = dict(zip(names, merged.momenta, strict=True)) if merged.momenta else {}
    return (one,), merged.measured, {name: moved[name] for name in moved if name in alone}


def check_one_mask(plans: Sequence[RoundPlan]) -> None:
    """Raise `ConfigError` where clients of a round send other elements than the first."""
    first = plans[0]
    for plan in plans[1:]:
        if (plan.drop_rate, plan.mask_key, plan.rank) != (
            first.drop_rate, first.mask_key, first.rank,
        ):  # fmt: skip
            raise ConfigError(
                f"clients {first.client} and {plan.client} have drop rates {first.drop_rate} and "
                f"{plan.drop_rate}: a robust rule compares the same elements of all; give all "
                "clients one drop rate (their value formats may differ), or leave robust out"
            )
