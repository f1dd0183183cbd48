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
        own = tensor.device.type == "cpu" and tensor.dtype.itemsize == 4
        found[name] = tensor.numpy().copy() if own else tensor.cpu().float().numpy()
    return found


def returned_state(named: Mapping[str, Any], state: Mapping[str, NDArray]) -> State:
    """The state after training that began with ``state``.

    What rounding to bfloat16 took from it when it was placed is no part of the change: such a
    tensor is w + (t − round(w)), with t as it was trained.
    """
    import torch

    found = on_host(named)
    for name, parameter in named.items():
        if parameter.dtype == torch.bfloat16:
            begun = torch.tensor(np.asarray(state[name], np.float32))
            change = torch.from_numpy(found[name]) - begun.bfloat16().float()
            found[name] = begun.add_(change).numpy()
    return found
