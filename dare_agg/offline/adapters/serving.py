"""What vLLM would refuse of an adapter, or quietly serve as another one.

The rules are those of vLLM's reader of PEFT folders (``vllm.lora``: ``PEFTHelper`` and the names
that its loader takes): one rank and one alpha, factors A and B of modules alone, no bias, no
module saved whole, no DoRA, and a rank that the server was started for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dare_agg.errors import ConfigError
from dare_agg.offline.adapters.folder import AdapterFolder, open_adapter
from dare_agg.offline.adapters.keys import PREFIX

# vLLM's own default, and what `--max-lora-rank` takes.
DEFAULT_RANK = 16
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_FACTORS = (".lora_A.weight", ".lora_B.weight")


def describe_adapter(path: Path, max_rank: int = DEFAULT_RANK) -> dict[str, Any]:
    """What an adapter is, and under "vllm" the line of `vllm_word`; raises as that."""
    folder = open_adapter(path)
    config = folder.config
    return {
        "kind": folder.kind,
        "base": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": config.get("target_modules"),
        "tensors": len(list(folder.tensors.names)),
        "vllm": vllm_word(path, max_rank),
    }


def vllm_word(path: Path, max_rank: int = DEFAULT_RANK) -> str:
    """One line: that vLLM takes the adapter, and how it is started, or what it would refuse.

    Raises `ConfigError` for a ``max_rank`` that vLLM has not, `CheckpointError` for no adapter.
    """
    if max_rank not in RANKS:
        raise ConfigError(f"max-lora-rank = {max_rank}; vLLM takes {', '.join(map(str, RANKS))}")
    folder = open_adapter(path)
    found = refusals(folder, max_rank)
    if found:
        return f"vLLM would refuse it: {'; '.join(found)}"
    # Where the default would do, it need not be said.
    flag = "" if max_rank == DEFAULT_RANK else f" --max-lora-rank {max_rank}"
    return f"vLLM takes it: --enable-lora{flag} --lora-modules NAME={folder.path}"


def refusals(folder: AdapterFolder, max_rank: int = DEFAULT_RANK) -> list[str]:
    """What vLLM would refuse, or not heed, of an adapter; empty where it takes it whole."""
    config, found = folder.config, []
    if folder.kind != "LORA":
        found.append(f"it is {folder.kind}, and only LoRA is served")
    for key in ("r", "lora_alpha", "target_modules"):
        if config.get(key) is None:
            found.append(f"adapter_config.json has no {key}")
    rank = _most_rank(config)
    if rank > max_rank:
        room = next((r for r in RANKS if r >= rank), None)
        remedy = (
            f"start it with --max-lora-rank {room}" if room else f"at most {RANKS[-1]} is possible"
        )
        found.append(f"rank {rank} is above {max_rank}: {remedy}")
    if config.get("use_dora"):
        found.append("DoRA is not served: serve the merged model")
    if config.get("modules_to_save"):
        whole = ", ".join(map(str, config["modules_to_save"]))[:80]
        found.append(f"modules saved whole ({whole}): serve the merged model")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        found.append("biases are not served: serve the merged model")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            found.append(f"{key} is not heeded: modules would count with another scaling")
    odd = [n for n in folder.tensors.names if not n.endswith(_FACTORS) or PREFIX not in n]
    if odd and not found:
        found.append(f"tensor {odd[0]!r} is no factor of a module")
    return found


def _most_rank(config: Mapping[str, Any]) -> int:
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
    return max((r for r in ranks if isinstance(r, int) and not isinstance(r, bool)), default=0)
