"""The loop of one round: batch by batch, a loss, its gradient, a step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from client.config import TaskConfig
from client.devices import Compute
from client.optimizer import make_optimizer
from client.rows import Indices
from client.schedule import ONLY_ROUND, Progress, rate_factor

# Halvings of float16's scale before a step is given up: from 2^16 to below 1.
_TRIES = 20


@dataclass(frozen=True)
class Lesson:
    """What is learnt: the trained parameters of a network, by name, and the loss of some rows.

    The loss is a tensor to be differentiated.
    """

    config: TaskConfig
    compute: Compute
    network: Any
    named: Mapping[str, Any]
    loss: Callable[[Indices], Any]
    progress: Progress = ONLY_ROUND


def learn(lesson: Lesson, batches: Sequence[Indices]) -> list[float]:
    """Train on the batches in their order; returns each one's loss."""
    import torch

    optimizer = make_optimizer(lesson.config, lesson.named, lesson.network)
    factor = rate_factor(lesson.config, len(batches), lesson.progress)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    scaler = lesson.compute.scaler()
    losses = []
    for at in batches:
        losses.append(_step(lesson, optimizer, scaler, at))
        schedule.step()
    return losses


def _step(lesson: Lesson, optimizer: Any, scaler: Any, at: Indices) -> float:
    """One step; where float16 overflows it is taken again at half the scale, not lost."""
    import torch

    for _ in range(_TRIES):
        optimizer.zero_grad(set_to_none=True)
        loss = lesson.loss(at)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if lesson.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(lesson.named.values(), lesson.config.clip_norm)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            break
    return float(loss.detach())
