"""The optimizer of a round: torch's AdamW, its groups of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from client.bfloat16 import bfloat16_adamw
from client.config import TaskConfig


def make_optimizer(
    config: TaskConfig, named: Mapping[str, Any], network: Any, seed: Sequence[int] = ()
) -> Any:
    """AdamW over the trained parameters (by name) of a network.

    The head has a rate of its own. With ``weight_decay_on`` "matrices" biases, norms and
    embeddings do not decay, nor what is tied to an embedding. Where parameters are bfloat16, the
    ``seed`` is that of their rounding.
    """
    import torch

    spared = _spared(named, network) if config.weight_decay_on == "matrices" else set()
    groups = []
    for decays in (True, False) if spared else (True,):
        chosen = {n: p for n, p in named.items() if (n in spared) is not decays}
        decay = config.weight_decay if decays else 0.0
        head = [p for n, p in chosen.items() if n.startswith("head.")]
        body = [p for n, p in chosen.items() if not n.startswith("head.")]
        groups += [
            {"params": body, "lr": config.learning_rate, "weight_decay": decay},
            {"params": head, "lr": config.head_learning_rate, "weight_decay": decay},
        ]
    if any(p.dtype == torch.bfloat16 for p in named.values()):
        return bfloat16_adamw(groups, seed, nearest=config.weights == "bfloat16-nearest")
    # Fused on every kind of device that torch has.
    return torch.optim.AdamW(groups, fused=True)


def _spared(named: Mapping[str, Any], network: Any) -> set[str]:
    """The names of biases, norms' scales and embeddings."""
    import torch

    embeddings = {
        id(module.weight) for module in network.modules() if isinstance(module, torch.nn.Embedding)
    }
    return {n for n, p in named.items() if p.dim() < 2 or id(p) in embeddings}
