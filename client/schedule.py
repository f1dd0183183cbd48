"""Learning rates over a round or a whole run: warm-up, then a curve of the table.

A rate is a function of the position alone, so that a client that joins late, or after a
restart, is where the others are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from client.config import TaskConfig

# What is left of the rate when a share s of the way after the warm-up lies behind.
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda s: 1.0,
    "linear": lambda s: 1.0 - s,
    "cosine": lambda s: 0.5 * (1.0 + math.cos(math.pi * s)),
}


@dataclass(frozen=True)
class Progress:
    """Which round of how many is trained, counted from 1."""

    round: int = 1
    rounds: int = 1


ONLY_ROUND = Progress()


def rate_factor(config: TaskConfig, steps: int, progress: Progress) -> Callable[[int], float]:
    """What the learning rate is multiplied by in each of a round's ``steps``, counted from 0.

    With T steps in all (of the round, or of all rounds at this client's number a round) and w of
    warm-up, step t has (t + 1)/w before w, then the schedule's value at (t − w)/(T − w). A
    ``warm_up`` below 1 is a share of T, from 1 on a number of steps.
    """
    whole = config.schedule_over == "run"
    total = steps * progress.rounds if whole else steps
    before = steps * (progress.round - 1) if whole else 0
    warm = config.warm_up
    if warm:
        warm = max(1, round(warm * total if warm < 1 else warm))
    curve = SCHEDULES[config.schedule]

    def factor(step: int) -> float:
        at = before + step
        if at < warm:
            return (at + 1) / warm
        # A resumed run may have fewer rounds than one of its clients has seen.
        return curve(min(1.0, (at - warm) / max(1, total - warm)))

    return factor
