"""A round's updates merged into the next version: in memory, on disk, or as a private release."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.downlink.protocol import Downlink
from dare_agg.downlink.store import VersionStore
from dare_agg.flower.private_rounds import PrivateRounds
from dare_agg.rounds.chain import Passed
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.server import advance, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import StepState
from dare_agg.rounds.streamed import advance_streamed
from dare_agg.vectors.model import GlobalModel


@dataclass(frozen=True)
class Moved:
    """What a round made of the model, and what it measured.

    ``plans`` are those of the merged updates; of a release of noise alone, the round's.
    ``tensor_squares`` are known of a version on disk alone.
    """

    model: GlobalModel
    step_state: StepState
    plans: Sequence[RoundPlan]
    measurements: dict[str, Any]
    tensor_squares: NDArray[np.float64] | None = None


def merge_passed(
    model: GlobalModel,
    state: StepState,
    passed: Passed,
    settings: FederatedSettings,
    downlink: Downlink,
    plans: Sequence[RoundPlan],
    *,
    store: VersionStore | None = None,
    private: PrivateRounds | None = None,
) -> Moved:
    """Merge what the steps let through, of replies with these plans, and take the server step."""
    squares = None
    if store is not None:
        moved, step_state, streamed = advance_streamed(
            model, state, passed.accepted, settings, store, plans
        )
        measured, squares = dict(streamed.measurements), streamed.tensor_squares
    else:
        if private is None:
            merged = merge_round(model, passed.accepted, settings)
        else:
            merged = private.merge(model, passed.accepted)
            assert private.plan is not None
            plans = plans or [private.plan]
        moved, step_state = advance(model, state, merged, settings, downlink, plans)
        measured = dict(merged.measurements)
    if passed.measurements:
        measured["steps"] = [dict(of_step) for of_step in passed.measurements]
    momenta = {**state.momenta, **passed.momenta}
    return Moved(moved, replace(step_state, momenta=momenta), plans, measured, squares)
