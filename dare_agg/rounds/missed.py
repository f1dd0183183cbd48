"""Rounds that moved nothing: how many there may be, and what is said of them at the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from dare_agg.errors import RunError
from dare_agg.rounds.server import Rejection

# What is wrong with an app or its settings rather than with a round: FedAvg too ends a run there.
_LASTING = frozenset(("config", "layout", "mod", "package", "statistics", "version", "weight"))


@dataclass
class Tally:
    """How many rounds of a run moved the model, and why the others did not.

    ``empty`` of them in a row were the last.
    """

    moved: int = 0
    empty: int = 0
    missed: list[RunError] = field(default_factory=list)

    def move(self) -> None:
        """Count a round that moved the model."""
        self.moved += 1
        self.empty = 0

    def miss(self, error: RunError, rejections: Sequence[Rejection], most: int | None) -> None:
        """Count a round that moved nothing; raises ``error`` when there were too many in a row.

        Too many are more than ``most``, None for any number. It is raised too where every answer
        was one that would be given again (`_LASTING`).
        """
        self.empty += 1
        self.missed.append(error)
        given = [rejection.reason for rejection in rejections]
        lasting = bool(given) and _LASTING.issuperset(given)
        if lasting or (most is not None and self.empty > most):
            raise error

    def check(self, log: logging.Logger) -> None:
        """Say at the end how many rounds moved nothing; raises `RunError` where all did."""
        if not self.missed:
            return
        count, last = len(self.missed), self.missed[-1]
        if not self.moved:
            raise RunError(
                f"the model is as it was: none of {count} rounds got enough updates; the last, "
                f"{last}",
                reason=last.reason,
            )
        log.warning(
            "%d of %d rounds left the model as it was; the last, %s",
            count,
            count + self.moved,
            last,
        )
