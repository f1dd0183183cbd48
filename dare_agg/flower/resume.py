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

from dare_agg.downlink.base import BASE_NAME, BASE_VERSION
from dare_agg.errors import StateError
from dare_agg.flower.lazy import record_of
from dare_agg.flower.round_outcome import RoundOutcome
from dare_agg.flower.round_strategy import RoundStrategy
from dare_agg.flower.transport import to_numpy
from dare_agg.rounds.state import StateFolder, pack_round, unpack_model, unpack_step
from dare_agg.rounds.step import StepState
from dare_agg.vectors.model import global_model

LOG = logging.getLogger("flwr")
# How tensors were grouped: states of before say nothing (`split_tensors`).
_BY_FORM = "grouped-by-form"
_APART = "tensors-apart"
_PLACE = "base-place"


@dataclass(frozen=True)
class Resumed:
    """Where a run stands: arrays and step state after ``round``, and the facts kept with it."""

    round: int
    arrays: ArrayRecord
    step_state: StepState
    version: str
    facts: Mapping[str, Any]


def keep_base(folder: StateFolder, base: ArrayRecord | RoundStrategy) -> None:
    """Keep what the run starts from; call it before the first round.

    Of a strategy whose base lies on disk, given itself, nothing is copied: the state says which
    base it is, and where it was. Raises `StateError` where rounds of an earlier run are,
    `ConfigError` for a strategy without such a base.
    """
    if isinstance(base, RoundStrategy):
        base.begin()
        folder.save_base({}, _base_facts(base))
    else:
        folder.save_base(to_numpy(base))


def _base_facts(strategy: RoundStrategy) -> dict[str, str]:
    named = strategy.named_base
    assert named is not None
    version = strategy.downlink.facts()[BASE_VERSION]
    return {BASE_VERSION: version, BASE_NAME: named.name, _PLACE: str(named.place)}


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
                **strategy.kept_facts(),
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
    to another downlink or has another base, or where another run is at work in the folder.
    """
    folder.claim()
    state, problems = folder.load()
    for problem in problems:
        LOG.warning("%s; going on from the round before", problem)
    if state is None:
        if folder.begun:
            strategy.take_up_begun()
        return None
    terms = strategy.settings.terms
    by_form = bool(state.facts.get(_BY_FORM, False))
    apart = tuple(map(str, state.facts.get(_APART, ())))
    strategy.broadcasting.by_form, strategy.broadcasting.apart = by_form, apart
    if strategy.named_base is None:
        base = global_model(
            folder.load_base(),
            dense=terms.dense,
            exclude=terms.exclude,
            by_form=by_form,
            apart=apart,
        )
    else:
        base = strategy.named_base.model(terms.dense, terms.exclude, apart)
        _check_base(folder, base.ref.version, str(strategy.named_base.place))
    model = unpack_model(state, base, strategy.downlink)
    if strategy.named_base is not None:
        strategy.broadcasting.move(model)
    strategy.secret = state.raw("secret")
    strategy.take_up(state.facts)
    LOG.info("resuming after round %d, version %s", state.round, model.ref.version[:12])
    named = strategy.named_base is not None
    arrays = strategy.broadcasting.arrays if named else record_of(model)
    return Resumed(state.round, arrays, unpack_step(state), model.ref.version, state.facts)


def _check_base(folder: StateFolder, version: str, place: str) -> None:
    """Raise `StateError` where a strategy's base on disk is not the one that the run began with."""
    kept = folder.base_facts()
    found = kept.get(BASE_VERSION)
    if found != version:
        begun = (
            f"base {str(kept.get(BASE_NAME, ''))!r}, fingerprint {str(found)[:12]}, which lay in "
            f"{kept.get(_PLACE)}"
            if found
            else "arrays of its own"
        )
        raise StateError(
            f"the run in {folder.path} was begun with {begun}; {place} has {version[:12]}: give "
            "the base it was begun with, or name another state folder"
        )
