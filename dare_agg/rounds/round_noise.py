"""The noise of each round's drop: measured, warned of, and told to the next round's terms."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.fitted_rates import tensor_squares
from dare_agg.downlink.store import VersionStore
from dare_agg.rounds.auto import judge
from dare_agg.rounds.auto_state import AutoState
from dare_agg.rounds.choosing import Squares, loudest_words
from dare_agg.rounds.noise import (
    NoiseWatch,
    error_of_plan,
    is_held_by_weights,
    norm_of,
    round_noise,
)
from dare_agg.rounds.own_terms import OwnTerms
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.vectors.model import GlobalModel


@dataclass
class RoundNoise:
    """Looks at round after round of a run; ``called`` is what its words are given to.

    ``hidden`` says whether a wrapper's noise hides norms, which the next terms then do not follow.
    """

    called: str
    log: logging.Logger
    settings: FederatedSettings
    own_terms: OwnTerms
    store: VersionStore | None = None
    hidden: Callable[[], bool] = lambda: False
    _watch: NoiseWatch = field(default_factory=NoiseWatch)

    def look(
        self,
        measured: dict[str, Any],
        plans: Sequence[RoundPlan],
        weights: Sequence[float],
        model: GlobalModel,
        moved: GlobalModel,
        state: AutoState,
        sums: NDArray[np.float64] | None = None,
    ) -> AutoState:
        """Measure the noise of a round's drop, and warn once of what would ruin the model.

        ``sums`` are the squares of each tensor's change where both versions are not at hand.
        Returns what is kept of it for the next round's terms.
        """
        settings, norms = self.settings, measured["delta_norms"]
        layout = model.groups.layout
        # On disk the version before is no more, and fine-tuning leaves the base's norm as it is.
        size = norm_of(model.delta) if self.store is None else self.store.base_norm
        size = size or norm_of(moved.delta)
        noise = round_noise(plans, norms, weights, settings, model.groups, size)
        errors = [error_of_plan(plan) for plan in plans]
        held = size if is_held_by_weights(settings, model.groups) else None
        judged = judge(norms, weights, errors, settings, held, measured.get("merged_norm"))
        if noise is None and judged is not None:
            noise = judged.of_weights(judged.error)
        measured["noise"] = noise
        measured["noise_of_change"] = judged.of_change(judged.error) if judged else None

        def squares() -> NDArray[np.float64]:
            if sums is not None:
                return sums
            return tensor_squares(layout.sizes, (model.delta[:], moved.delta[:]))

        chooser = self.own_terms.chooser
        if chooser is not None:
            known = None if self.hidden() else judged
            state, said = chooser.after(layout, state, known, measured, squares)
        else:
            said = self._too_loud(noise, plans, measured, moved, squares)
        if said:
            self.log.warning("round %d: %s", measured["round"], said)
            measured["noise_warning"] = said
        return state

    def _too_loud(
        self,
        noise: float | None,
        plans: Sequence[RoundPlan],
        measured: Mapping[str, Any],
        moved: GlobalModel,
        squares: Squares,
    ) -> str:
        """What is to be warned of at terms that the app chose, "" for nothing."""
        remedy = self._watch.look(noise, plans)
        if remedy is None:
            return ""
        nbytes = remedy.nbytes(moved.delta.size) + max(measured["dense_bytes"])
        budget = f"an upload_budget of at least {nbytes} bytes"
        return (
            f"the drop's noise is {100 * self._watch.loudest:.0f} % of the weights' own size"
            f"{loudest_words(moved.groups.layout, squares())}: the model changes too much a round "
            "for what is sent of it, as in training from scratch, and may end far below FedAvg's; "
            f"give {self.called} "
            f"{budget if self.own_terms.upload_budget else remedy}"
        )
