"""Rounds of secure sums without any that lacks noise: what goes with them, and when they end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dare_agg.errors import ConfigError
from dare_agg.flower.budgets import RELEASES, bears_round, budget_facts, say_promise
from dare_agg.privacy.sharing import SharedPrivacy, SharedRun
from dare_agg.rounds.private import check_private_model
from dare_agg.secure.groups import GroupedServer
from dare_agg.vectors.model import GlobalModel


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
        say_promise(self.run, self.privacy.ledger)

    @property
    def running(self) -> SharedRun:
        """The run; raises `ConfigError` where none was begun."""
        if self.run is None:
            raise ConfigError("privacy of clients in secure sums: call the strategy's start")
        return self.run

    def may_go_on(self, number: int, first: bool) -> bool:
        """Whether the budget bears a round; raises `PrivacyError` where not even the first."""
        return bears_round(self.running, number, first)

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
        return budget_facts(self.run)

    def take_up(self, facts: Mapping[str, Any]) -> None:
        """Go on with the run whose state has these facts: its budget must know its releases."""
        self._releases = facts.get(RELEASES)
