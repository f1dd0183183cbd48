"""A state and the parameters that hold it: which they are, how values go in and come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.adapters.settings import is_adapted
from client.config import TaskConfig
from dare_agg.errors import ConfigError

State = dict[str, NDArray[np.float32]]


def state_parameters(network: Any, config: TaskConfig) -> dict[str, Any]:
    """The parameters of the state: all for full fine-tuning, the trained ones else."""
    named = dict(network.named_parameters())
    if config.train == "full":
        return named
    if config.train == "lora":
        bias = config.lora_bias
        return {n: p for n, p in named.items() if n.startswith("head.") or is_adapted(n, bias)}
    return {n: p for n, p in named.items() if n.startswith("head.")}


def place_state(named: Mapping[str, Any], state: Mapping[str, NDArray]) -> None:
    """Put a state's values into parameters; raises `ConfigError` for one of another model."""
    import torch

    with torch.no_grad():
        for name, parameter in named.items():
            if name not in state:
                raise ConfigError(f"state has no tensor {name!r}; it was made for another model")
            values = np.asarray(state[name], np.float32)
            if not values.flags.writeable:  # torch warns of those
                values = values.copy()
            parameter.copy_(torch.from_numpy(values))


def on_host(named: Mapping[str, Any]) -> State:
    """Copies of parameters as float32 arrays; from a GPU each moves once."""
    found = {}
    for name, parameter in named.items():
        tensor = parameter.detach()
        found[name] = tensor.numpy().copy() if tensor.device.type == "cpu" else tensor.cpu().numpy()
    return found
