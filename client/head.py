"""What goes on a pretrained model: a seeded linear head, and adapters where asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from client.adapters.four_bits import check_loaded
from client.adapters.settings import check_rank, lora_settings
from client.config import TaskConfig
from dare_agg.errors import ConfigError


def linear_head(width: int, labels: int, seed: int) -> Any:
    """Make a linear layer with weights of N(0, 0.02²) from the seed and a bias of 0."""
    import torch

    head = torch.nn.Linear(width, labels)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 20]))
    start = rng.standard_normal((labels, width)).astype(np.float32) * np.float32(0.02)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(start))
        head.bias.zero_()
    return head


def with_adapters(encoder: Any, config: TaskConfig) -> Any:
    """Return the encoder, with LoRA adapters on ``lora_targets`` where "lora" is trained.

    Without names, PEFT's table says which modules of the architecture get them. Raises
    `ConfigError` where no module has such a name, the table does not know the model, or a
    setting does not fit it.
    """
    if config.train != "lora":
        return encoder
    import torch
    from peft import get_peft_model

    check_loaded(encoder, config)
    settings = lora_settings(encoder, config)
    torch.manual_seed(config.seed)
    try:
        network = get_peft_model(encoder, settings)
    except ValueError as error:
        raise ConfigError(
            f"lora-targets {', '.join(config.lora_targets) or '(none named)'} do not fit model "
            f"{config.model!r}: {' '.join(str(error).split())[:200]}"
        ) from error
    check_rank(network, config)
    return network
