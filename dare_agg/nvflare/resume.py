"""What a job leaves on the server after each round, and how the next one goes on from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from dare_agg.downlink.protocol import Downlink
from dare_agg.errors import StateError
from dare_agg.rounds.state import StateFolder, pack_round, unpack_model, unpack_step
from dare_agg.rounds.step import StepState
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import Arrays, GlobalModel, global_model

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """Where a run stands after ``round``."""

    round: int
    model: GlobalModel
    step_state: StepState
    secret: bytes


class KeptRun:
    """The folder of a run's states; ``resume`` says that a run in it is to go on."""

    def __init__(self, folder: str, resume: bool) -> None:
        self._folder, self._resume = StateFolder(folder), resume

    def begin(
        self, arrays: Arrays, given: GlobalModel, terms: UpdateTerms, downlink: Downlink
    ) -> Resumed | None:
        """Keep what a run starts from, or go on from its last whole round; None for a new one.

        ``given`` is the model that ``arrays`` are. Raises `StateError` where another process is
        at work in the folder, where rounds are in it that are not to go on, and for a run that
        began with another model or downlink.
        """
        self._folder.claim()
        if not self._resume or not self._folder.rounds():
            self._folder.save_base(arrays)
            return None
        state, problems = self._folder.load()
        for problem in problems:
            LOG.warning("%s; going on from the round before", problem)
        assert state is not None
        base = global_model(
            self._folder.load_base(), dense=terms.dense, exclude=terms.exclude, by_form=True
        )
        if base.groups.layout != given.groups.layout:
            raise StateError(
                f"the run in {self._folder.path} was begun with another model; give the one it "
                "was begun with, or name another folder"
            )
        model = unpack_model(state, base, downlink)
        return Resumed(state.round, model, unpack_step(state), state.raw("secret"))

    def save(
        self,
        number: int,
        model: GlobalModel,
        step_state: StepState,
        secret: bytes,
        downlink: Downlink,
    ) -> None:
        """Keep a finished round; raises `StateError` when it cannot be written."""
        facts = {"secret": secret.hex()}
        self._folder.save(pack_round(number, model, step_state, facts, downlink))
