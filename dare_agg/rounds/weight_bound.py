"""No client counts for more than a multiple of the round's median weight: the first step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from dare_agg.rounds.chain import Passed, StepContext
from dare_agg.rounds.server import Accepted
from dare_agg.rounds.settings import WEIGHTINGS, FederatedSettings


def bounded_weights(weights: Sequence[float], bound: float) -> list[float]:
    """Cut each weight to ``bound`` times their median; a bound of 0 leaves all as they are.

    Of two in the middle the lower is taken, so that the bound holds between two as well.
    """
    limit = bound * statistics.median_low(weights) if bound and weights else math.inf
    return [min(weight, limit) for weight in weights]


def bound_weights(accepted: Sequence[Accepted], settings: FederatedSettings) -> list[Accepted]:
    """The replies with their weights cut to the settings' bound; those below it are the same."""
    if not WEIGHTINGS[settings.weighting]:
        return list(accepted)
    counted = bounded_weights([reply.weight for reply in accepted], settings.weight_bound)
    return [
        replace(reply, weight=weight) if weight < reply.weight else reply
        for reply, weight in zip(accepted, counted, strict=True)
    ]


def bound_step(accepted: Sequence[Accepted], context: StepContext) -> Passed:
    """The step: measures ``weights_cut``, the clients who claimed more, where there are any."""
    bounded = bound_weights(accepted, context.settings)
    cut = [a.plan.client for a, b in zip(accepted, bounded, strict=True) if b is not a]
    return Passed(tuple(bounded), measurements=({"weights_cut": cut},) if cut else ())
