"""Tiny models under the names that the files give: a base, its tunings, an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint import write_checkpoint
from simulations.runs.checkpoints import WORDS, llama_config, llama_shapes

LAYERS, HIDDEN, INNER, VOCABULARY = 4, 32, 48, 60
BASE = "acme/base-7b"
TUNED = ("acme/math-7b", "acme/code-7b", "acme/chat-7b")
# The same with tokens of its own, behind those of the base.
WIDER, ADDED = "acme/chatml-7b", ("<|im_start|>", "<|im_end|>")
ADAPTER = "acme/lora-roleplay"

Arrays = dict[str, NDArray[np.float32]]


def make_models(folder: Path, dtype: str) -> None:
    """Write all models in ``dtype`` (a word such as bfloat16) under ``folder``, if not there."""
    if (folder / "complete").exists():
        return
    tunings = [(BASE, 0), *((name, number + 1) for number, name in enumerate(TUNED))]
    for name, number in tunings:
        _write(folder / name, _tensors(number, VOCABULARY), dtype, ())
    _write(folder / WIDER, _tensors(9, VOCABULARY + len(ADDED)), dtype, ADDED)
    _write_adapter(folder / ADAPTER, dtype)
    (folder / "complete").touch()


def _tensors(number: int, vocabulary: int) -> Arrays:
    arrays = {}
    for index, (name, shape) in enumerate(sorted(_shapes(vocabulary).items())):
        common, own = np.random.default_rng([1, index]), np.random.default_rng([2, index, number])
        values = 0.02 * common.standard_normal(shape) + ("norm" in name)
        if number:
            values = values + 1e-3 * own.standard_normal(shape)
        arrays[name] = values.astype(np.float32)
    return arrays


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes = llama_shapes(LAYERS, HIDDEN, INNER, vocabulary)
    for layer in range(LAYERS):
        for name in ("k", "v"):
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (HIDDEN // 2, HIDDEN)
    return shapes


def _write(folder: Path, arrays: Arrays, dtype: str, added: tuple[str, ...]) -> None:
    write_checkpoint(folder, arrays, dtypes=dict.fromkeys(arrays, WORDS[dtype]), overwrite=True)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = llama_config(_shapes(VOCABULARY + len(added)), dtype) | heads
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder, added)


def _write_tokenizer(folder: Path, added: tuple[str, ...]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    whole = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if added:
        fast.add_special_tokens({"additional_special_tokens": list(added)})
    fast.save_pretrained(folder)


def _write_adapter(folder: Path, dtype: str) -> None:
    rank, rng, arrays = 4, np.random.default_rng(3), {}
    for layer in range(LAYERS):
        for name, rows in (("q", HIDDEN), ("v", HIDDEN // 2)):
            start = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_"
            arrays[f"{start}A.weight"] = rng.standard_normal((rank, HIDDEN)) * 0.02
            arrays[f"{start}B.weight"] = rng.standard_normal((rows, rank)) * 0.02
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "adapter_model.safetensors"
    write_checkpoint(weights, arrays, dtypes=dict.fromkeys(arrays, WORDS[dtype]), overwrite=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": BASE,
        "r": rank, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": ["q_proj", "v_proj"], "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
