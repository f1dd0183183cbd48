"""The loop of one round: batch by batch, a loss, its gradient, a step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from client.config import TaskConfig
from client.devices import Compute
from client.kept_optimizer import KeptOptimizer
from client.optimizer import make_optimizer
from client.proximal import proximal
from client.rows import Indices
from client.schedule import ONLY_ROUND, Progress, rate_factor
from client.stopping import EarlyStop
from client.tasks.task import Batch
from dare_agg.errors import ConfigError

# Halvings of float16's scale before a step is given up: from 2^16 to below 1.
_TRIES = 20


class Reading(NamedTuple):
    """Some rows as the network takes them, their flat targets, and how many of those count."""

    batch: Batch
    targets: Any
    counted: int


@dataclass(frozen=True)
class Lesson:
    """What is learnt: the trained parameters of a network, by name, and how rows are scored.

    ``read`` reads some rows and counts their targets, ``loss`` is the mean over those, a tensor to
    be differentiated.
    """

    config: TaskConfig
    compute: Compute
    network: Any
    named: Mapping[str, Any]
    read: Callable[[Indices], Reading]
    loss: Callable[[Reading], Any]
    progress: Progress = ONLY_ROUND
    stop: EarlyStop | None = None
    moments: KeptOptimizer | None = None
    seed: Sequence[int] = ()


def learn(lesson: Lesson, batches: Sequence[Indices]) -> list[float]:
    """Train on the batches in their order; returns each one's loss.

    A batch of which no target counts is passed over. Raises `ConfigError` where all are.
    """
    optimizer = make_optimizer(lesson.config, lesson.named, lesson.network, lesson.seed)
    if lesson.moments:
        lesson.moments.load(optimizer, lesson.named)
    factor = rate_factor(lesson.config, len(batches), lesson.progress)
    rates = [group["lr"] for group in optimizer.param_groups]
    scaler = lesson.compute.scaler()
    pull = proximal(lesson.named.values(), lesson.config.proximal_mu)
    losses = []
    if lesson.stop:
        lesson.stop.begin()
    for step, at in enumerate(batches):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step)
        if pieces := _pieces(lesson, at):
            losses.append(_step(lesson, optimizer, scaler, pieces, pull))
        if lesson.stop and lesson.stop.over(step + 1):
            break
    if lesson.stop:
        lesson.stop.end(step + 1)
    if lesson.moments and losses:
        lesson.moments.save(optimizer, lesson.named)
    if not losses:
        raise ConfigError(
            f"no target counts in any of the {sum(map(len, batches))} rows of this round: labels "
            "are masked entirely, or texts too short; look at the data and at length"
        )
    return losses


def _pieces(lesson: Lesson, at: Indices) -> list[Reading]:
    """A batch in ``accumulate`` pieces; those of which no target counts are left out."""
    parts = np.array_split(at, min(lesson.config.accumulate, len(at)))
    return [read for part in parts if (read := lesson.read(part)).counted]


def _step(
    lesson: Lesson,
    optimizer: Any,
    scaler: Any,
    pieces: Sequence[Reading],
    pull: Callable[[], None],
) -> float:
    """One step; where float16 overflows it is taken again at half the scale, not lost."""
    import torch

    for _ in range(_TRIES):
        optimizer.zero_grad(set_to_none=True)
        loss = _backward(lesson, scaler, pieces)
        scaler.unscale_(optimizer)
        pull()
        if lesson.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(lesson.named.values(), lesson.config.clip_norm)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            break
    return loss


def _backward(lesson: Lesson, scaler: Any, pieces: Sequence[Reading]) -> float:
    """Add up the gradient of the mean loss over all targets of the pieces; returns that loss."""
    total = sum(piece.counted for piece in pieces)
    found = 0.0
    for piece in pieces:
        loss = lesson.loss(piece)
        if len(pieces) > 1:
            loss = loss * (piece.counted / total)
        scaler.scale(loss).backward()
        found += float(loss.detach())
    return found
