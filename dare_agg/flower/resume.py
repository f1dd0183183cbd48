"""Stopping and going on: what a strategy leaves on disk after a round, and how it takes it up.

::

    kept = StateFolder("runs/a/state")
    resumed = resume(strategy, kept)                  # None where nothing was finished
    strategy.start(grid, resumed.arrays, start_round=resumed.round + 1,
                   step_state=resumed.step_state, ...)

and in the round hook ``save(strategy, kept, outcome)``. A run that was killed at any moment
and resumed ends with the same bits as one that was not, if its clients are deterministic.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord

from dare_agg.flower.round_outcome import RoundOutcome
from dare_agg.flower.round_strategy import RoundStrategy
from dare_agg.flower.transport import to_numpy, to_record
from dare_agg.rounds.state import StateFolder, pack_round, unpack_model, unpack_step
from dare_agg.rounds.step import StepState
from dare_agg.vectors.model import global_model

LOG = logging.getLogger("flwr")
# How tensors were grouped: states of before say nothing (`split_tensors`).
_BY_FORM = "grouped-by-form"
_APART = "tensors-apart"


@dataclass(frozen=True)
class Resumed:
    """Where a run stands: arrays and step state after ``round``, and the facts kept with it."""

    round: int
    arrays: ArrayRecord
    step_state: StepState
    version: str
    facts: Mapping[str, Any]


def keep_base(folder: StateFolder, arrays: ArrayRecord) -> None:
    """Keep what the run starts from; call it before the first round."""
    folder.save_base(to_numpy(arrays))


def save(
    strategy: RoundStrategy,
    folder: StateFolder,
    outcome: RoundOutcome,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Keep a finished round; raises `StateError` when it cannot be written."""
    groups = strategy.broadcasting
    folder.save(
        pack_round(
            outcome.round,
            outcome.model,
            outcome.step_state,
            {
                **(facts or {}),
                "secret": strategy.secret.hex(),
                _BY_FORM: groups.by_form,
                _APART: list(groups.apart),
            },
            strategy.downlink,
        )
    )


def resume(strategy: RoundStrategy, folder: StateFolder) -> Resumed | None:
    """Bring a new strategy to the last finished round; None where there is none.

    Raises `StateError` where rounds were kept and none is whole, where the strategy is set
    to another downlink, or where another run is at work in the folder.
    """
    folder.claim()
    state, problems = folder.load()
    for problem in problems:
        LOG.warning("%s; going on from the round before", problem)
    if state is None:
        return None
    terms = strategy.settings.terms
    by_form = bool(state.facts.get(_BY_FORM, False))
    apart = tuple(map(str, state.facts.get(_APART, ())))
    strategy.broadcasting.by_form, strategy.broadcasting.apart = by_form, apart
    base = global_model(
        folder.load_base(),
        dense=terms.dense,
        exclude=terms.exclude,
        by_form=by_form,
        apart=apart,
    )
    model = unpack_model(state, base, strategy.downlink)
    strategy.secret = state.raw("secret")
    LOG.info("resuming after round %d, version %s", state.round, model.ref.version[:12])
    return Resumed(
        state.round, to_record(model.arrays()), unpack_step(state), model.ref.version, state.facts
    )
