"""Rounds that keep clients' privacy: who is drawn, what is released, when the run ends."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from dare_agg.errors import ConfigError
from dare_agg.flower.budgets import RELEASES, bears_round, budget_facts, say_promise
from dare_agg.flower.clients import Client
from dare_agg.privacy.clients import ClientPrivacy, PrivateRun
from dare_agg.privacy.spaced import SpacedRun
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.private import check_private_model, check_private_settings, private_round
from dare_agg.rounds.server import Accepted, MergedRound
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.vectors.model import GlobalModel

LOG = logging.getLogger("flwr")


class PrivateRounds:
    """What a strategy asks about privacy in each of its rounds.

    Raises `ConfigError` for settings, and words of the strategy (``others``), that break the
    promise.
    """

    def __init__(
        self,
        privacy: ClientPrivacy,
        settings: FederatedSettings,
        rate: float,
        others: Mapping[str, object],
    ) -> None:
        check_private_settings(settings)
        privacy.check_rate(rate)
        for word, value in others.items():
            if value:
                raise ConfigError(
                    f"privacy of clients with {word}: what a client does to the sum is no longer "
                    f"bounded by the norm, or not clipped; leave {word} out"
                )
        self.privacy, self.settings, self.rate = privacy, settings, rate
        self.run: PrivateRun | SpacedRun | None = None
        self.plan: RoundPlan | None = None
        self._names: list[str] = []
        self._releases: object = 0

    def take_up(self, facts: Mapping[str, Any]) -> None:
        """Go on with the run whose state has these facts: its budget must know its releases."""
        self._releases = facts.get(RELEASES)

    def facts(self) -> dict[str, Any]:
        """What a round's state keeps."""
        return budget_facts(self.run)

    def begin(self, rounds: int) -> None:
        """Open the budget, with the noise of so many rounds; raises as `ClientPrivacy.begin`."""
        self.run = self.privacy.begin(max(1, rounds), self.rate)
        self.run.budget.check_resumed(self._releases)
        say_promise(self.run, self.privacy.ledger)

    @property
    def running(self) -> PrivateRun | SpacedRun:
        """The run; in a loop of an app's own it begins with its first round."""
        if self.run is None:
            if not self.privacy.noise:
                raise ConfigError(
                    "privacy of clients in a loop of your own: how many rounds share the budget "
                    "is not known; give ClientPrivacy its noise"
                )
            self.begin(1)
        assert self.run is not None
        return self.run

    def may_go_on(self, number: int, first: bool) -> bool:
        """Whether the budget bears a round; raises `PrivacyError` where not even the first."""
        return self.running.made(number) or bears_round(self.running, number, first)

    def drawn(self, number: int, clients: Sequence[Client]) -> list[Client]:
        """The clients that take part in a round, as the run draws or chooses them; may be none."""
        drawn = self.running.drawn(number, [client.hello.name for client in clients])
        chosen = [client for client, takes in zip(clients, drawn, strict=True) if takes]
        how = self.running.statement()["sampling"]
        LOG.info("train: %d of %d clients (%s)", len(chosen), len(clients), how)
        return chosen

    def open(self, model: GlobalModel, plan: RoundPlan, clients: Sequence[Client]) -> None:
        """Take a round's plan, whose mask is that of all its ``clients``; checks the model."""
        check_private_model(model)
        self.plan = plan
        self._names = [client.hello.name for client in clients]

    def merge(self, model: GlobalModel, accepted: Sequence[Accepted]) -> MergedRound:
        """Release the round; raises as `private_round`."""
        assert self.plan is not None
        run, names = self.running, self._names
        return private_round(model, self.plan, accepted, self.settings, run, names)
