"""The optimizer of a round: torch's AdamW, the head at a rate of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from client.config import TaskConfig


def make_optimizer(config: TaskConfig, named: Mapping[str, Any]) -> Any:
    """AdamW over the trained parameters, by name."""
    import torch

    head = [p for n, p in named.items() if n.startswith("head.")]
    body = [p for n, p in named.items() if not n.startswith("head.")]
    groups = [
        {"params": body, "lr": config.learning_rate},
        {"params": head, "lr": config.head_learning_rate},
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
