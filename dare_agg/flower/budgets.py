"""The privacy budget of a run's rounds: what is said of it, what it bears, what a state keeps."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Protocol

from dare_agg.errors import PrivacyError
from dare_agg.privacy.ledger import Budget

LOG = logging.getLogger("flwr")
# Of a round's state: how many releases the run had made.
RELEASES = "privacy-releases"


class ChargedRun(Protocol):
    """A run whose releases are charged to a budget."""

    budget: Budget

    @property
    def epsilon(self) -> float:
        """What is spent so far."""

    @property
    def may_go_on(self) -> bool:
        """Whether the budget bears another release."""

    def statement(self) -> Mapping[str, Any]:
        """The promise in words and numbers."""


def say_promise(run: ChargedRun, ledger: str | os.PathLike[str] | None) -> None:
    """Log what a run promises, and that without a ledger it cannot be resumed."""
    said = run.statement()
    LOG.info(
        "\t├── Privacy: unit %s; neighbours: %s; sampling: %s; %s",
        said["unit"],
        said["neighbours"],
        said["sampling"],
        said["mechanism"],
    )
    LOG.info(
        "\t├── Privacy: ε %.4g of %.4g spent at δ %.2g among %d clients; noise multiplier %.4g",
        said["epsilon"],
        said["epsilon_budget"],
        said["delta"],
        said["members"],
        said["noise_multiplier"],
    )
    if ledger is None:
        LOG.warning("the privacy budget is kept in memory alone; name a ledger to resume by")


def bears_round(run: ChargedRun, number: int, first: bool) -> bool:
    """Whether the budget bears a round; raises `PrivacyError` where not even the first."""
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


def budget_facts(run: ChargedRun | None) -> dict[str, Any]:
    """What a round's state keeps."""
    return {RELEASES: len(run.budget.charges) if run else 0}
