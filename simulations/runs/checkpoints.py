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
    layers: int = 16,
    hidden: int = 1024,
    inner: int = 2816,
    vocabulary: int = 32_000,
    key_values: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes; the defaults have 271 M parameters.

    ``key_values`` are the rows of keys and of values where heads share them (grouped queries).
    """
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (vocabulary, hidden),
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        start = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            rows = key_values if key_values and name in ("k", "v") else hidden
            shapes[f"{start}self_attn.{name}_proj.weight"] = (rows, hidden)
        for name in ("gate", "up"):
            shapes[f"{start}mlp.{name}_proj.weight"] = (inner, hidden)
        shapes[f"{start}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{start}input_layernorm.weight"] = (hidden,)
        shapes[f"{start}post_attention_layernorm.weight"] = (hidden,)
    return shapes


def llama_3_8b_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of Llama 3 8B: 8.03 thousand million parameters.

    Source: the config.json of meta-llama/Meta-Llama-3-8B.
    """
    return llama_shapes(32, 4096, 14_336, 128_256, key_values=1024)


def gpt2_shapes(layers: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a GPT-2: 124 M parameters for (12, 768), 774 M for (36, 1280).

    Source: Hugging Face's `GPT2Model`, whose linear layers are stored transposed; the output layer
    is tied to the embedding and has no tensor of its own.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (50_257, hidden),
        "wpe.weight": (1024, hidden),
    }
    for layer in range(layers):
        start = f"h.{layer}."
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{start}{name}.{part}": (hidden,) for part in ("weight", "bias")}
        for name, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, 4 * hidden),
            ("mlp.c_proj", 4 * hidden, hidden),
        ):
            shapes[f"{start}{name}.weight"] = (rows, columns)
            shapes[f"{start}{name}.bias"] = (columns,)
    return shapes | {"ln_f.weight": (hidden,), "ln_f.bias": (hidden,)}


def llama_config(shapes: dict[str, tuple[int, ...]], dtype: str) -> dict[str, object]:
    vocabulary, hidden = shapes["lm_head.weight"]
    layers = sum(name.endswith("input_layernorm.weight") for name in shapes)
    inner = shapes["model.layers.0.mlp.gate_proj.weight"][0] if layers else 4 * hidden
    heads = max(16, hidden // 128)
    shared = shapes["model.layers.0.self_attn.k_proj.weight"][0] if layers else hidden
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads * shared // hidden, "vocab_size": vocabulary,
        "torch_dtype": dtype, "tie_word_embeddings": False, "max_position_embeddings": 2048,
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
    ``repeated`` one tile of each serves all of its tensors, each from a place of its own: quick,
    for measuring memory.
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
                tile = _tile(common, own, number, spread, _TILE + len(shapes))
            for index, (name, shape) in enumerate(sorted(shapes.items())):
                size = int(np.prod(shape))
                base = np.random.default_rng([1, index])
                noise = np.random.default_rng([2, index, number])
                for lo in range(0, size, _TILE):
                    count = min(_TILE, size - lo)
                    values = tile[index : index + count] if tile is not None else None
                    if values is None:
                        values = _tile(base, noise, number, spread, count)
                    writer.write(name, lo, values)
            llama = "lm_head.weight" in shapes
            config = llama_config(shapes, dtype) if llama else {"torch_dtype": dtype}
            (writer.folder / "config.json").write_text(json.dumps(config, indent=1))
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
