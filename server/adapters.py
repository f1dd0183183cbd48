"""A run's adapters as PEFT saves them: names in a file, and a complete configuration."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import save_file

from dare_agg.checkpoint import open_tensors
from dare_agg.errors import CheckpointError
from dare_agg.offline.adapters.folder import CONFIG_NAME, WEIGHTS_NAME

PREFIX = "base_model.model."
# As PEFT names an adapter that is given no name.
_ADAPTER = "default"


def write_adapter(
    folder: Path,
    tensors: Mapping[str, NDArray[Any]],
    config: Mapping[str, Any],
    *,
    model: str,
    base: Path | None,
    language: bool,
) -> None:
    """Write the adapter of a run as ``PeftModel.from_pretrained`` and vLLM read it.

    ``tensors`` are those of a running model, ``config`` the run config.
    """
    folder.mkdir(parents=True)
    named = {file_name(name): array for name, array in tensors.items()}
    save_file(named, folder / WEIGHTS_NAME, {"format": "pt"})
    settings = adapter_config(tensors, config, model=model, base=base, language=language)
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=1) + "\n")


def file_name(name: str) -> str:
    """The name in an adapter's file of a tensor of a running model: without the adapter's own.

    >>> file_name("base_model.model.q.lora_A.default.weight")
    'base_model.model.q.lora_A.weight'
    >>> file_name("base_model.model.score.modules_to_save.default.weight")
    'base_model.model.score.weight'
    """
    plain = name.replace(f".modules_to_save.{_ADAPTER}.", ".")
    if f".lora_magnitude_vector.{_ADAPTER}.weight" in plain:
        return plain.removesuffix(f".{_ADAPTER}.weight")
    before, mark, after = plain.rpartition(".lora_")
    return before + mark + after.replace(f".{_ADAPTER}", "") if mark else plain


def adapter_config(
    tensors: Mapping[str, NDArray[Any]],
    config: Mapping[str, Any],
    *,
    model: str,
    base: Path | None,
    language: bool,
) -> dict[str, Any]:
    """The ``adapter_config.json`` of these tensors, trained by this run config.

    Modules are named by the last part of their names where that means them all and no other of
    the base, else in full. One of another rank than the run's has it in ``rank_pattern``, and an
    alpha that leaves its scaling as it was trained.
    """
    ranks = module_ranks(tensors)
    rank = int(config.get("lora-rank") or Counter(ranks.values()).most_common(1)[0][0])
    alpha = config.get("lora-alpha")
    rslora = bool(config.get("lora-rslora", False))
    unlike = {module: own for module, own in ranks.items() if own != rank}
    ratio = math.sqrt if rslora else float
    whole = {n.split(".modules_to_save.")[0] for n in tensors if ".modules_to_save." in n}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if language else "FEATURE_EXTRACTION",
        "base_model_name_or_path": model,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _targets(ranks, base),
        "exclude_modules": None,
        "rank_pattern": unlike,
        "alpha_pattern": {m: alpha * ratio(own) / ratio(rank) for m, own in unlike.items()}
        if alpha is not None
        else {},
        "lora_dropout": 0.0,
        "bias": config.get("lora-bias", "none"),
        "modules_to_save": sorted(name.removeprefix(PREFIX) for name in whole) or None,
        "use_rslora": rslora,
        "use_dora": any(".lora_magnitude_vector." in name for name in tensors),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def module_ranks(tensors: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """The rank of each adapted module, by its name in the base, in order."""
    found = {}
    for name, array in tensors.items():
        for mark in (".lora_A.", ".lora_embedding_A."):
            if mark in name:
                found[name.split(mark)[0].removeprefix(PREFIX)] = int(array.shape[0])
    return found


def _targets(modules: Collection[str], base: Path | None) -> list[str]:
    """Last parts of the modules' names, or the whole names where those would mean others too."""
    ours = Counter(name.rpartition(".")[2] for name in modules)
    if base is not None:
        try:
            tensors = open_tensors(base).tensors
        except CheckpointError:  # a GGUF file, or none: nothing is known of its modules
            return sorted(modules)
        theirs = Counter(
            name.removesuffix(".weight").rpartition(".")[2]
            for name, tensor in tensors.items()
            if name.endswith(".weight") and len(tensor.shape) > 1
        )
        if all(theirs[leaf] == count for leaf, count in ours.items()):
            return sorted(ours)
    return sorted(modules)
