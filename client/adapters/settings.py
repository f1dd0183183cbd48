"""PEFT's settings of a run's adapters, checked against the model before anything trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from client.adapters.targets import named_modules, target_modules
from client.config import TaskConfig
from dare_agg.errors import ConfigError

ADAPTER = "default"


def lora_settings(network: Any, config: TaskConfig) -> Any:
    """PEFT's ``LoraConfig`` for a network.

    Raises `ConfigError` for targets that fit nothing, a rank that a matrix does not have, modules
    that cannot be trained whole, and DoRA on what has no rows to measure.
    """
    from peft import LoraConfig

    targets = list(config.lora_targets)
    if config.lora_rank < 1 or config.lora_alpha < 1:
        word = "lora-rank" if config.lora_rank < 1 else "lora-alpha"
        value = config.lora_rank if config.lora_rank < 1 else config.lora_alpha
        raise ConfigError(
            f"{word} = {value}; at least 1 is needed: the adapters are alpha/rank·B·A of that rank"
        )
    names = target_modules(network, targets, config.model) if targets else None
    whole = named_modules(network, config.lora_whole, config.model, "lora-whole")
    owners = _owners(network)
    _check_tied(owners, names or (), config.model)
    _check_whole(network, owners, whole, names or (), config.model)
    return LoraConfig(
        lora_dropout=config.dropout,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=names,
        bias=config.lora_bias,  # type: ignore[arg-type]
        modules_to_save=list(config.lora_whole) or None,
        use_rslora=config.lora_rslora,
        use_dora=config.lora_dora,
    )


def lora_scaling(rank: int, alpha: float, rslora: bool) -> float:
    """α/r, the factor on B·A; with rsLoRA α/√r."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def is_adapted(name: str, bias: str) -> bool:
    """Whether a parameter of a model with adapters is theirs, and so of the state that travels.

    Factors and magnitudes, what ``lora-whole`` names, and the biases that ``lora-bias`` frees.
    """
    if ".original_module." in name:
        return False
    if "lora_" in name or ".modules_to_save." in name:
        return True
    return name.endswith(".base_layer.bias" if bias == "lora_only" else ".bias") and bias != "none"


def check_rank(network: Any, config: TaskConfig) -> None:
    """Refuse a rank above the smaller side of an adapted matrix; ``network`` has the adapters."""
    for name, module in network.named_modules():
        factors = getattr(module, "lora_B", None)
        if factors is None or ADAPTER not in factors:
            continue
        inputs = math.prod(module.lora_A[ADAPTER].weight.shape[1:])
        sides = min(inputs, module.lora_B[ADAPTER].weight.shape[0])
        if config.lora_rank > sides:
            raise ConfigError(
                f"lora-rank = {config.lora_rank} is above the rank of "
                f"{name.removeprefix('base_model.model.')!r} of model {config.model!r}, which has "
                f"{inputs} inputs and {module.lora_B[ADAPTER].weight.shape[0]} outputs: at most "
                f"{sides}, or leave the module out of lora-targets"
            )


def _owners(network: Any) -> dict[str, list[str]]:
    """By each parameter's name, the names of the same parameter in other modules."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: [n for n in same if n != name] for same in names.values() for name in same}


def _check_tied(owners: Mapping[str, list[str]], targets: Sequence[str], model: str) -> None:
    """Refuse adapters on tied weights: merged, they would change what was trained without them."""
    for name in targets:
        if others := owners.get(f"{name}.weight"):
            raise ConfigError(
                f"lora-targets: {name!r} of model {model!r} shares its weights with {others[0]!r}, "
                "which would not have its adapter in training and would once it is merged; leave "
                "it out"
            )


def _check_whole(
    network: Any,
    owners: Mapping[str, list[str]],
    whole: Sequence[str],
    targets: Sequence[str],
    model: str,
) -> None:
    """Refuse modules that are tied to others, hold no weights, or have adapters too."""
    by_name = dict(network.named_modules())
    for name in whole:
        own = [f"{name}.{n}" for n, _ in by_name[name].named_parameters()]
        if not own:
            raise ConfigError(f"lora-whole {name!r} of model {model!r} has no weights to train")
        tied = [other for n in own for other in owners[n] if not other.startswith(f"{name}.")]
        if tied:
            raise ConfigError(
                f"lora-whole {name!r} of model {model!r} shares its weights with {tied[0]!r}: "
                "trained whole the two would part; leave it out, or put adapters on other modules"
            )
        both = next((t for t in targets if t == name or t.startswith(f"{name}.")), None)
        if both:
            raise ConfigError(
                f"{both!r} of model {model!r} is in lora-targets and in lora-whole ({name!r}); a "
                "module gets adapters or is trained whole: name it in one of them"
            )
