"""Tiny models of other people's libraries, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.cli.main import main

WEIGHTS = "model.safetensors"


def llama(folder: Path, seed: int = 0, *, size: float = 2e-3, **config: Any) -> Path:
    """Write a two-layer Llama; seed 0 is the base, others are it with noise of ``size``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
    if seed:
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += size * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(folder)
    return folder


def tensors(path: Path) -> dict[str, NDArray[Any]]:
    """All tensors of a file or folder; floating-point ones as float32."""
    from safetensors.torch import load_file

    found: dict[str, NDArray[Any]] = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        for name, value in load_file(file).items():
            found[name] = (value.float() if value.is_floating_point() else value).numpy()
    return found


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Replace a folder's tensors by ``change`` of them (torch tensors by name)."""
    from safetensors.torch import load_file, save_file

    file = folder / WEIGHTS
    changed = change(load_file(file))
    save_file({n: t.contiguous().clone() for n, t in changed.items()}, file, {"format": "pt"})


def command(capsys: Any, *words: object) -> tuple[int, str]:
    """Run dare-agg; returns its exit status and all that it printed."""
    capsys.readouterr()
    try:
        main([str(word) for word in words])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    return status, said.out + said.err


def worst(ours: Mapping[str, NDArray[Any]], right: Mapping[str, NDArray[Any]]) -> float:
    """The largest difference of any element of the tensors that ``right`` has."""
    return max(float(np.abs(ours[name] - right[name]).max()) for name in right)
