"""DP-SGD: a round's steps on rows drawn at random, their gradients clipped one by one, and noise.

What Opacus does in hooks is done here a row at a time. Hooks see a module's inputs and outputs
and take their first axis for the batch: of an encoder's position embeddings, which have none,
they get gradients that are too small, so that a row moves the sum by more than the norm; and
they keep a whole gradient of each row (`simulations/bench/row_gradients.py` measures both). A
pass of one row has that row's gradient whatever the network does: tied weights, biases that all
positions share, batch normalisation with fixed statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from client.config import TaskConfig
from client.learning import Lesson
from client.optimizer import make_optimizer
from client.proximal import proximal
from client.rows import Indices
from client.schedule import rate_factor
from dare_agg.codec.derive import derive_key
from dare_agg.errors import ConfigError
from dare_agg.privacy.gradients import clip_to, drawn_rows, noised


@dataclass(frozen=True)
class PrivateSteps:
    """How a round is trained in private: its steps, its sampling, norm, noise and secret key.

    A step draws each row with probability ``rate``; ``batch`` is what the sum is divided by,
    whatever was drawn.
    """

    steps: int
    batch: int
    rate: float
    clip: float
    noise: float
    key: bytes = field(repr=False)

    @property
    def secret_seed(self) -> tuple[int, ...]:
        """What dropout draws from."""
        return (int.from_bytes(derive_key(self.key, "record dropout"), "little"),)


def check_private(network: Any, config: TaskConfig) -> None:
    """Raise `ConfigError` for a network, or settings, whose rows do not learn by themselves."""
    import torch

    for name, module in network.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise ConfigError(
                f"dp = 'records': {name!r} of model {config.model!r} is batch normalisation over "
                "the rows of a batch, which mixes them: no row's gradient is its own. Take a model "
                "with layer or group normalisation, or one whose batch normalisation keeps its "
                "statistics (track_running_stats), which stay as they were pretrained"
            )


def learn_privately(
    lesson: Lesson,
    rows: Indices,
    how: PrivateSteps,
    readable: Callable[[Indices], Indices],
) -> None:
    """Train on rows by noised steps; nothing is told of losses, which are the rows' own.

    A step of which no row was drawn, or none can be read, is noise alone and is taken too.
    """
    import torch

    optimizer = make_optimizer(lesson.config, lesson.named, lesson.network, lesson.seed)
    if lesson.moments:
        lesson.moments.load(optimizer, lesson.named)
    factor = rate_factor(lesson.config, how.steps, lesson.progress)
    rates = [group["lr"] for group in optimizer.param_groups]
    pull = proximal(lesson.named.values(), lesson.config.proximal_mu)
    size = sum(p.numel() for p in lesson.named.values())
    norm = clip_to(how.clip, how.noise, size)
    for step in range(how.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step)
        drawn = rows[drawn_rows(how.key, step, len(rows), how.rate)]
        sums = clipped_sum(lesson, readable(drawn) if len(drawn) else drawn, norm)
        # Without a copy: the noise is added to what these tensors hold.
        parts = [part.cpu().numpy() for part in sums.values()]
        noised(parts, how.noise * how.clip, how.key, step)
        for (name, parameter), part in zip(lesson.named.items(), parts, strict=True):
            part /= how.batch
            found = torch.from_numpy(part).reshape(sums[name].shape)
            parameter.grad = found.to(device=parameter.device, dtype=parameter.dtype)
        del sums, parts
        pull()
        if lesson.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(lesson.named.values(), lesson.config.clip_norm)
        optimizer.step()
    if lesson.moments:
        lesson.moments.save(optimizer, lesson.named)


def clipped_sum(lesson: Lesson, rows: Indices, norm: float) -> Mapping[str, Any]:
    """Σ over rows of each one's gradient, scaled to ``norm`` at most, by name in float64.

    A row of which no target counts, and one whose gradient is no finite number, adds nothing.
    """
    import torch

    # Where the device has no float64, on the host.
    place = {n: "cpu" if p.device.type == "mps" else p.device for n, p in lesson.named.items()}
    sums = {
        name: torch.zeros(p.shape, dtype=torch.float64, device=place[name])
        for name, p in lesson.named.items()
    }
    for row in rows:
        read = lesson.read(np.array([row]))
        if not read.counted:
            continue
        for parameter in lesson.named.values():
            parameter.grad = None
        lesson.loss(read).backward()
        found = {
            name: p.grad.detach().to(place[name])
            for name, p in lesson.named.items()
            if p.grad is not None
        }
        squares = [
            float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in found.values()
        ]
        length = math.sqrt(math.fsum(squares)) if squares else 0.0
        if not math.isfinite(length):
            continue
        share = min(1.0, norm / length) if length else 0.0
        for name, gradient in found.items():
            sums[name].add_(gradient, alpha=share)
    for parameter in lesson.named.values():
        parameter.grad = None
    return sums
