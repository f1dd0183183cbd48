"""QLoRA: a frozen base in four bits (NF4, arXiv 2305.14314), which only CUDA has code for."""

from __future__ import annotations

from typing import Any

from client.adapters.cuda_codes import why_no_four_bits
from client.config import TaskConfig
from dare_agg.errors import ConfigError

FOUR_BITS = "nf4"


def check_four_bits(config: TaskConfig) -> None:
    """Raise `ConfigError` where a base is wanted in four bits and cannot be; loads no torch."""
    if config.weights != FOUR_BITS:
        return
    if lacks := why_no_four_bits(config.device):
        raise ConfigError(f'weights = "nf4": {lacks}')


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
