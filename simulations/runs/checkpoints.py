"""Synthetic checkpoints of a llama-like architecture, for benchmarks: a base and its tunings.

Values are drawn tile by tile, so that a model of any size is made in bounded memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dare_agg.checkpoint import CheckpointWriter, TensorPlan

WORDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_TILE = 1 << 20


def llama_shapes(
    layers: int = 16, hidden: int = 1024, inner: int = 2816, vocabulary: int = 32_000
) -> dict[str, tuple[int, ...]]:
    """Names and shapes; the defaults have 271 M parameters."""
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (vocabulary, hidden),
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        start = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{start}self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name in ("gate", "up"):
            shapes[f"{start}mlp.{name}_proj.weight"] = (inner, hidden)
        shapes[f"{start}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{start}input_layernorm.weight"] = (hidden,)
        shapes[f"{start}post_attention_layernorm.weight"] = (hidden,)
    return shapes


def llama_config(shapes: dict[str, tuple[int, ...]], dtype: str) -> dict[str, object]:
    vocabulary, hidden = shapes["lm_head.weight"]
    layers = sum(name.endswith("input_layernorm.weight") for name in shapes)
    inner = shapes["model.layers.0.mlp.gate_proj.weight"][0] if layers else 4 * hidden
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": vocabulary, "torch_dtype": dtype,
        "tie_word_embeddings": False, "max_position_embeddings": 2048,
    }  # fmt: skip


def _shard(number: int, shards: int) -> str:
    if shards == 1:
        return TensorPlan.shard
    return f"model-{number + 1:05d}-of-{shards:05d}.safetensors"


def make_checkpoints(
    folder: Path,
    tuned: int,
    dtype: str,
    shapes: dict[str, tuple[int, ...]] | None = None,
    spread: float = 0.001,
    shards: int = 1,
    repeated: bool = False,
) -> list[Path]:
    """Make ``base`` and ``tuned0…`` under ``folder`` (kept if there); returns their paths.

    The base is N(0, 0.02²), a tuned model the base plus N(0, ``spread``²), both rounded. With
    ``repeated`` one tile of each serves all of its tensors: quick, for measuring memory.
    """
    shapes = llama_shapes() if shapes is None else shapes
    paths = [folder / "base", *(folder / f"tuned{i}" for i in range(tuned))]
    plans = {
        name: TensorPlan(WORDS[dtype], shape, _shard(index * shards // len(shapes), shards))
        for index, (name, shape) in enumerate(shapes.items())
    }
    for number, path in enumerate(paths):
        if path.exists():
            continue
        with CheckpointWriter(path, plans, {"format": "pt"}, durable=False) as writer:
            tile = None
            if repeated:
                common, own = np.random.default_rng([1]), np.random.default_rng([2, number])
                tile = _tile(common, own, number, spread, _TILE)
            for index, (name, shape) in enumerate(sorted(shapes.items())):
                size = int(np.prod(shape))
                base = np.random.default_rng([1, index])
                noise = np.random.default_rng([2, index, number])
                for lo in range(0, size, _TILE):
                    count = min(_TILE, size - lo)
                    values = tile[:count] if tile is not None else None
                    if values is None:
                        values = _tile(base, noise, number, spread, count)
                    writer.write(name, lo, values)
            config = json.dumps(llama_config(shapes, dtype), indent=1)
            (writer.folder / "config.json").write_text(config)
    return paths


def _tile(
    base: np.random.Generator, noise: np.random.Generator, number: int, spread: float, count: int
) -> np.ndarray:
    values = base.standard_normal(count, np.float32)
    values *= np.float32(0.02)
    if number:
        change = noise.standard_normal(count, np.float32)
        change *= np.float32(spread)
        values += change
    return values
