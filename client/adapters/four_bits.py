"""QLoRA: a frozen base in four bits (NF4, arXiv 2305.14314), which only CUDA has code for."""

from __future__ import annotations

import importlib.util
from typing import Any

from client.config import TaskConfig
from dare_agg.deploy.devices import AUTO, parse_device, seen_by_driver
from dare_agg.errors import ConfigError

FOUR_BITS = "nf4"


def check_four_bits(config: TaskConfig) -> None:
    """Raise `ConfigError` where a base is wanted in four bits and cannot be; loads no torch."""
    if config.weights != FOUR_BITS:
        return
    kind, _ = parse_device(config.device)
    other = f'weights = "bfloat16" holds the base in 16 bits on any device ({kind!r} here)'
    if kind not in (AUTO, "cuda"):
        raise ConfigError(f'weights = "nf4" needs a CUDA device, and device is {kind!r}; {other}')
    if seen_by_driver("cuda") == 0:
        raise ConfigError(f'weights = "nf4" needs a CUDA device, and there is none here; {other}')
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            'weights = "nf4" needs the package bitsandbytes; install it with: pip install '
            f"bitsandbytes; {other}"
        )


def four_bit_words(config: TaskConfig) -> dict[str, Any]:
    """What ``from_pretrained`` is told beside the dtype; nothing where weights are numbers."""
    if config.weights != FOUR_BITS:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    from dare_agg.deploy.devices import find_device

    codes = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=FOUR_BITS,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": codes, "device_map": {"": find_device(config.device)}}


def check_loaded(network: Any, config: TaskConfig) -> None:
    """Refuse a network that was to be loaded in four bits, by a task that loads it otherwise."""
    if config.weights == FOUR_BITS and not any(
        type(module).__name__ == "Linear4bit" for module in network.modules()
    ):
        raise ConfigError(
            f'weights = "nf4" is of language models, and model {config.model!r} is loaded '
            'otherwise by this task; use "bfloat16"'
        )
