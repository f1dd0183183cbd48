"""A torch model's tensors under the names that its files know them by.

Wrappers (DDP, torch.compile, accelerate's) are seen through, a PEFT model is its adapter alone,
named as peft saves it, and tied weights are one tensor with several names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from dare_agg.errors import ConfigError, LayoutError
from dare_agg.vectors.model import Groups
from dare_agg.vectors.patterns import compile_patterns, matches
from dare_agg.vectors.returned import returned_tensors
from dare_agg.vectors.wrappers import WRAPPERS, unwrapped

Tensors = Mapping[str, Tensor]


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model inside its wrappers: modules that hold nothing but one other.

    >>> layer = nn.Linear(2, 2)
    >>> unwrapped_model(nn.DataParallel(layer)) is layer
    True
    """
    while True:
        children = dict(model.named_children())
        own = next(model.parameters(recurse=False), None)
        if own is not None or len(children) != 1 or not WRAPPERS.issuperset(children):
            return model
        model = next(iter(children.values()))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that a model would save, by name: parameters and buffers themselves, nothing copied.

    Of a PEFT model that is its active adapter. Raises `ConfigError` for what keeps parameters
    where their names do not lead to them: FSDP1, DeepSpeed's ZeRO 3, adapters that are computed.
    """
    _refuse_hidden(model)
    model = unwrapped_model(model)
    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    if hasattr(model, "peft_config"):
        state = _adapter(model, state)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def matched_tensors(
    groups: Groups, tensors: Tensors, exclude: Iterable[str] = ()
) -> dict[str, Tensor]:
    """A model's tensors by their names in the global model; what either lacks is left out.

    Further names of a tied weight and buffers that the global model does not have are the model's
    own affair. Raises `LayoutError` for other parameters and shapes, and where nothing fits.
    """
    patterns = list(exclude)
    offered = _one_name_each(tensors, set(groups.names), patterns)
    found = returned_tensors(dict.fromkeys(groups.names), offered, patterns)
    for copy, first in groups.copies.items():
        if copy in found:
            found.setdefault(first, found[copy])
    for layout in (groups.layout, groups.dense_layout):
        for entry in layout.entries:
            if entry.name in found:
                check_shape(entry.name, found[entry.name], entry.shape)
    return found


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `LayoutError` for a tensor of another shape; of one number, any will do."""
    own = tuple(tensor.shape)
    if own != shape and {*own, *shape, 1} != {1}:
        raise LayoutError(
            f"the model's tensor {name!r} has shape {own}, the global model's has {shape}: make "
            "the model as the run's base says, or name the tensor in 'exclude'"
        )


def _one_name_each(tensors: Tensors, known: set[str], exclude: list[str]) -> dict[str, Tensor]:
    """Leave out names that the global model lacks, where it has the tensor under another one,
    and buffers that it lacks."""
    patterns = compile_patterns(exclude)
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        names[id(tensor)].append(name)
    kept = {}
    for tied in names.values():
        there = [name for name in tied if name in known or unwrapped(name) in known]
        local = [name for name in tied if matches(name, patterns)]
        strange = tied[:1] if isinstance(tensors[tied[0]], nn.Parameter) else []
        kept.update({name: tensors[name] for name in there or local or strange})
    return kept


def _adapter(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a PEFT model's adapter, named as ``save_pretrained`` names them."""
    from peft.utils.save_and_load import get_peft_model_state_dict

    active: Any = getattr(model, "active_adapter", "default")
    adapters = [active] if isinstance(active, str) else list(active)
    if len(adapters) != 1:
        raise ConfigError(
            f"the PEFT model has {len(adapters)} active adapters, {adapters}; one is federated: "
            "call model.set_adapter with it"
        )
    found = get_peft_model_state_dict(
        model, state_dict=dict(state), adapter_name=adapters[0], save_embedding_layers=False
    )
    own = {id(value) for value in state.values()}
    computed = [name for name, value in found.items() if id(value) not in own]
    if computed:
        raise ConfigError(
            f"peft computes {computed[0]!r} when it saves this adapter, so training does not move "
            "it; federate LoRA, IA3 or another adapter of plain parameters"
        )
    return found


def _refuse_hidden(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ConfigError(
                "the model is wrapped by FSDP1, whose parameters are pieces without names; use "
                "torch.distributed.fsdp.fully_shard (FSDP2; accelerate: fsdp_version 2)"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ConfigError(
                f"parameter {name!r} is DeepSpeed's (ZeRO 3), which keeps it in pieces without "
                "names; use ZeRO 1 or 2, or FSDP2"
            )
