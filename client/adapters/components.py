"""A node of a smaller rank: it learns the first components of the run's adapters, no others.

All nodes hold the version whole, at the run's rank, so that each starts from the same model; the
other components take part in every product as they are. Gradients and the optimizer's moments
are those of the node's own components alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from client.adapters.settings import ADAPTER
from client.config import TaskConfig
from dare_agg.errors import ConfigError

# The axis of a factor along which its components lie.
_AXES = {f".lora_A.{ADAPTER}.weight": 0, f".lora_B.{ADAPTER}.weight": 1}
_OWN = "_own_components"


@contextmanager
def own_components(
    network: Any, named: Mapping[str, Any], config: TaskConfig
) -> Iterator[dict[str, Any]]:
    """What an optimizer is given of the state's parameters: of factors, this node's components.

    Within, the network computes with these; after it, they are written into the factors. Where
    the node learns all components, they are the parameters themselves. Raises `ConfigError` for
    adapters that cannot be learned in part.
    """
    rank = config.lora_own_rank
    if config.train != "lora" or not 0 < rank < config.lora_rank:
        yield dict(named)
        return
    try:
        yield {name: _part(network, name, whole, rank) for name, whole in named.items()}
    finally:
        _put_back(network)


def _put_back(network: Any) -> None:
    import torch

    for module in network.modules():
        own = module.__dict__.pop(_OWN, None)
        if own is not None:
            part, axis = own
            with torch.no_grad():
                module.weight.narrow(axis, 0, part.shape[axis]).copy_(part)
            del module.__dict__["forward"]


def _part(network: Any, name: str, whole: Any, rank: int) -> Any:
    import torch

    axis = next((axis for end, axis in _AXES.items() if name.endswith(end)), None)
    module = network.get_submodule(name.rpartition(".")[0])
    if axis is None and "lora_embedding_" not in name:
        return whole  # a magnitude, a bias, a module trained whole: they have no components
    if axis is None or not isinstance(module, torch.nn.Linear):
        raise ConfigError(
            f"lora-rank = {rank} of this node: {name.partition('.lora_')[0]!r} is no linear "
            "module, and its adapter cannot be learned in part; leave lora-rank out of the node's "
            "config, or the module out of lora-targets"
        )
    part = torch.nn.Parameter(whole.detach().narrow(axis, 0, rank).clone())
    rest = whole.detach().narrow(axis, rank, whole.shape[axis] - rank)

    def forward(inputs: Any) -> Any:
        return torch.nn.functional.linear(inputs, torch.cat((part, rest), dim=axis))

    # Beside the module's parameters, not among them: names and state stay as they are.
    module.__dict__[_OWN] = (part, axis)
    module.__dict__["forward"] = forward
    return part
