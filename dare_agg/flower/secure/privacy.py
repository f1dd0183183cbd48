"""Rounds of secure sums without any that lacks noise: what goes with them, and when they end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dare_agg.errors import ConfigError, PrivacyError
from dare_agg.flower.private_rounds import RELEASES
from dare_agg.privacy.sharing import SharedPrivacy, SharedRun
from dare_agg.rounds.private import check_private_model
from dare_agg.secure.groups import GroupedServer
from dare_agg.vectors.model import GlobalModel

LOG = logging.getLogger("flwr")


class NoisedRounds:
    """What a `SecureStrategy` asks about privacy in each of its rounds.

    Raises `ConfigError` for words of the strategy (``others``) that break the promise.
    """

    def __init__(
        self, privacy: SharedPrivacy, members: int, others: Mapping[str, tuple[object, str]]
    ) -> None:
        for word, (value, why) in others.items():
            if value:
                raise ConfigError(f"privacy of clients in secure sums with {word}: {why}")
        self.privacy, self.members = privacy.among(members), members
        self.run: SharedRun | None = None
        self._releases: object = 0

    def begin(self, rounds: int) -> None:
        """Open the budget, with the noise of so many rounds; raises as `SharedPrivacy.begin`."""
        self.run = self.privacy.begin(max(1, rounds), self.members)
        self.run.budget.check_resumed(self._releases)
        said = self.run.statement()
        LOG.info(
            "\t├── Privacy: unit %s; neighbours: %s; %s; ε %.4g of %.4g spent at δ %.2g among %d "
            "members; noise multiplier %.4g",
            said["unit"],
            said["neighbours"],
            said["mechanism"],
            said["epsilon"],
            said["epsilon_budget"],
            said["delta"],
            said["members"],
            said["noise_multiplier"],
        )
        if self.privacy.ledger is None:
            LOG.warning("the privacy budget is kept in memory alone; name a ledger to resume by")

    @property
    def running(self) -> SharedRun:
        """The run; raises `ConfigError` where none was begun."""
        if self.run is None:
            raise ConfigError("privacy of clients in secure sums: call the strategy's start")
        return self.run

    def may_go_on(self, number: int, first: bool) -> bool:
        """Whether the budget bears a round; raises `PrivacyError` where not even the first."""
        run = self.running
        if run.may_go_on:
            return True
        said = (
            f"round {number} would spend more than ε = {run.budget.epsilon:g} at δ = "
            f"{run.budget.delta:.2g}; spent: {run.epsilon:.4g}"
        )
        if first:
            raise PrivacyError(f"{said}; the model as it is is what the budget allows")
        LOG.warning("%s; the run ends with the model it has", said)
        return False

    def check_model(self, model: GlobalModel) -> None:
        """Raise `ConfigError` for tensors that noise ruins or does not hide."""
        check_private_model(model)

    def before(self, stage: str, number: int, server: GroupedServer) -> None:
        """Charge a round once its parties are about to put data in."""
        if stage == "contribute":
            (one,) = server.servers.values()
            self.running.charge(number, one.terms.session)

    def facts(self) -> dict[str, Any]:
        """What a round's state keeps."""
        return {RELEASES: len(self.run.budget.charges) if self.run else 0}

    def take_up(self, facts: Mapping[str, Any]) -> None:
        """Go on with the run whose state has these facts: its budget must know its releases."""
        self._releases = facts.get(RELEASES)
