"""Tiny models under the names that the files give: a base, its tunings, an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint import write_checkpoint
from simulations.runs.checkpoints import WORDS, llama_config, llama_shapes

BASE = "acme/base-7b"
TUNED = ("acme/math-7b", "acme/code-7b", "acme/chat-7b")
# The same with tokens of its own, behind those of the base.
WIDER, ADDED = "acme/chatml-7b", ("<|im_start|>", "<|im_end|>")
ADAPTER = "acme/lora-roleplay"
# The files' layer ranges count on so many.
LAYERS = 4

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Size:
    """A llama with twice as many heads as heads of keys and values."""

    hidden: int = 32
    inner: int = 48
    heads: int = 4
    vocabulary: int = 60
    rank: int = 4

    def shapes(self, added: int = 0) -> dict[str, tuple[int, ...]]:
        """Names and shapes, with so many tokens more."""
        found = llama_shapes(LAYERS, self.hidden, self.inner, self.vocabulary + added)
        for layer in range(LAYERS):
            for name in ("k", "v"):
                weight = f"model.layers.{layer}.self_attn.{name}_proj.weight"
                found[weight] = (self.hidden // 2, self.hidden)
        return found

    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of an adapter of queries and values."""
        found: dict[str, tuple[int, ...]] = {}
        for layer in range(LAYERS):
            for name, rows in (("q", self.hidden), ("v", self.hidden // 2)):
                start = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_"
                found[f"{start}A.weight"] = (self.rank, self.hidden)
                found[f"{start}B.weight"] = (rows, self.rank)
        return found

    def all_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Those of every model, and of the adapter."""
        plain = dict.fromkeys((BASE, *TUNED), self.shapes())
        return {**plain, WIDER: self.shapes(len(ADDED)), ADAPTER: self.adapter_shapes()}


def draw_models(size: Size) -> dict[str, Arrays]:
    """Weights of every model: N(0, 0.02²), of tuned ones with N(0, 0.001²) added."""
    return {
        name: _drawn(number, shapes, tuned=name not in (BASE, ADAPTER))
        for number, (name, shapes) in enumerate(size.all_shapes().items())
    }


def _drawn(number: int, shapes: Mapping[str, tuple[int, ...]], *, tuned: bool) -> Arrays:
    arrays = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        common, own = np.random.default_rng([1, index]), np.random.default_rng([2, index, number])
        values = 0.02 * common.standard_normal(shape) + ("norm" in name)
        if tuned:
            values = values + 1e-3 * own.standard_normal(shape)
        arrays[name] = values.astype(np.float32)
    return arrays


def write_models(folder: Path, dtype: str, drawn: Mapping[str, Arrays], size: Size) -> None:
    """Write all models in ``dtype`` (a word such as bfloat16) under ``folder``, if not there."""
    if (folder / "complete").exists():
        return
    for name in (BASE, *TUNED):
        _write(folder / name, drawn[name], dtype, size, ())
    _write(folder / WIDER, drawn[WIDER], dtype, size, ADDED)
    _write_adapter(folder / ADAPTER, drawn[ADAPTER], dtype, size.rank)
    (folder / "complete").touch()


def _write(folder: Path, arrays: Arrays, dtype: str, size: Size, added: tuple[str, ...]) -> None:
    write_checkpoint(folder, arrays, dtypes=dict.fromkeys(arrays, WORDS[dtype]), overwrite=True)
    heads = {
        "num_attention_heads": size.heads, "num_key_value_heads": size.heads // 2,
        "max_position_embeddings": 64,
    }  # fmt: skip
    config = llama_config(size.shapes(len(added)), dtype) | heads
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder, size.vocabulary, added)


def _write_tokenizer(folder: Path, vocabulary: int, added: tuple[str, ...]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(vocabulary - 3))]
    whole = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if added:
        fast.add_special_tokens({"additional_special_tokens": list(added)})
    fast.save_pretrained(folder)


def _write_adapter(folder: Path, arrays: Arrays, dtype: str, rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "adapter_model.safetensors"
    write_checkpoint(weights, arrays, dtypes=dict.fromkeys(arrays, WORDS[dtype]), overwrite=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": BASE,
        "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "target_modules": ["q_proj", "v_proj"], "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
