"""How a network runs while it trains: without dropout unless asked for, activations kept or not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from client.config import TaskConfig
from client.devices import Compute
from dare_agg.errors import ConfigError

# How models call a rate that no layer of torch's own holds: attention_dropout, resid_pdrop, …
_RATE = re.compile(r"(?!layer)\w*(dropout|pdrop)(_prob|_p|_rate)?")


def prepare(network: Any, config: TaskConfig) -> None:
    """Set a network up for training: nothing random but what ``dropout`` asks for.

    Counts of batch normalisation stay the pretrained ones. With ``checkpointing`` a layer's
    activations are made again in the backward pass instead of being kept. Raises `ConfigError`
    where a model has no dropout, or cannot do that.
    """
    network.eval()
    if not config.dropout and not config.checkpointing:
        return
    found = _set_dropout(network, config.dropout)
    if config.dropout and not found:
        raise ConfigError(
            f"dropout = {config.dropout:g}: model {config.model!r} has no dropout; leave it out"
        )
    if config.checkpointing:
        _checkpoint(network, config)


def _set_dropout(network: Any, rate: float) -> bool:
    """Give every dropout of a network this rate; returns whether it has any."""
    import torch

    found = False
    for module in network.modules():
        held = isinstance(module, torch.nn.modules.dropout._DropoutNd)
        if held:
            module.p = rate
        else:
            for name, value in vars(module).items():
                if type(value) in (float, int) and _RATE.fullmatch(name):
                    setattr(module, name, float(rate))
                    held = True
        # Of this module alone: what lies in it may hold batch normalisation.
        module.training = held and rate > 0
        found = found or held
    return found


def _checkpoint(network: Any, config: TaskConfig) -> None:
    from transformers import PreTrainedModel

    model = next((m for m in network.modules() if isinstance(m, PreTrainedModel)), None)
    if model is None or not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"checkpointing: model {config.model!r} cannot make activations again; leave it out, "
            "and raise accumulate for less memory"
        )
    # Its name until transformers 5.20 or so.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for module in network.modules():
        # They look at this flag; without dropout it means nothing else to them.
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


@contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """A context in the midst of training in which a network is only looked at."""
    import torch

    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def seeded(seed: Sequence[int], config: TaskConfig, compute: Compute) -> Iterator[None]:
    """A context in which dropout draws from the seed; torch's own generators stay as they were."""
    if not config.dropout:
        yield
        return
    import torch

    words = np.random.SeedSequence([*(int(s) for s in seed), 50]).generate_state(2, np.uint32)
    numbered = [compute.device] if compute.kind in ("cuda", "xpu") else []
    device_type = compute.kind if numbered else "cuda"
    with torch.random.fork_rng(devices=numbered, device_type=device_type):
        torch.manual_seed(int(words[0]) << 31 | int(words[1]))
        yield
