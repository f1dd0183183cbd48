"""Early stop: a round ends when rows kept aside are learnt no more, and its best state stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from client.config import TaskConfig
from client.partition import hold_out
from client.rows import Indices
from dare_agg.errors import ConfigError


def rows_aside(
    rows: Indices, config: TaskConfig, readable: Callable[[str, Indices], Indices]
) -> tuple[Indices, Indices]:
    """The rows to train on and those that tell when to stop, the same ones each round.

    Raises `ConfigError` where there are too few rows, or none of those kept aside can be read.
    """
    if not config.early_stop:
        return rows, rows[:0]
    rows, aside = hold_out(rows, config.early_stop_rows, (config.seed, 61), word="early-stop-rows")
    good = readable("train", aside)
    if not len(good):
        raise ConfigError(f"none of the {len(aside)} rows of early-stop-rows can be read; raise it")
    return rows, good


@dataclass
class EarlyStop:
    """Watches parameters by a loss, every so many steps; the received state takes part.

    ``measure`` gives the loss on the rows kept aside. After ``patience`` looks in a row without a
    lower one the round is over. The best state takes the memory of one more.
    """

    named: Mapping[str, Any]
    measure: Callable[[], float]
    patience: int
    every: int
    best_loss: float = field(default=math.inf, init=False)
    best_step: int = field(default=0, init=False)
    _looked: int = field(default=-1, init=False)
    _missed: int = field(default=0, init=False)
    _best: list[Any] = field(default_factory=list, init=False)

    def begin(self) -> None:
        """Look at the state before the first step."""
        self._best = [parameter.detach().clone() for parameter in self.named.values()]
        self.best_loss = loss if (loss := self.measure()) < math.inf else math.inf
        self._looked = 0

    def over(self, step: int) -> bool:
        """Whether the round is over after so many steps."""
        if step % self.every == 0:
            self._look(step)
        return self._missed >= self.patience

    def end(self, step: int) -> None:
        """Look at the last state too, and put the best one back."""
        import torch

        if self._looked != step:
            self._look(step)
        with torch.no_grad():
            for parameter, best in zip(self.named.values(), self._best, strict=True):
                parameter.copy_(best)

    def _look(self, step: int) -> None:
        self._looked = step
        loss = self.measure()
        if not loss < self.best_loss:
            self._missed += 1
            return
        self.best_loss, self.best_step, self._missed = loss, step, 0
        for parameter, best in zip(self.named.values(), self._best, strict=True):
            best.copy_(parameter.detach())
