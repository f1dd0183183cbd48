"""Quantised checkpoints are refused wherever a model is taken, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dare_agg.checkpoint import CheckpointWriter, TensorPlan, open_checkpoint
from dare_agg.checkpoint.declared import declared_in
from dare_agg.checkpoint.quantised import QuantisedError
from tests.tiny import command

Q = "model.layers.0.self_attn.q_proj"
E = "model.layers.0.mlp.experts"
NORM: dict[str, tuple[str, tuple[int, ...]]] = {"model.norm.weight": ("F32", (8,))}


def write(
    folder: Path,
    extra: dict[str, tuple[str, tuple[int, ...]]],
    config: dict[str, Any] | None = None,
    *,
    base: bool = True,
    fill: int = 0,
) -> Path:
    """A folder of tensors by dtype and shape, all bytes ``fill``."""
    shapes = {**(NORM if base else {}), **extra}
    plans = {name: TensorPlan(*plan) for name, plan in shapes.items()}
    with CheckpointWriter(folder, plans, {"format": "pt"}) as writer:
        for name, plan in plans.items():
            width = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U32": 4, "I16": 2}
            count = int(np.prod(plan.shape)) * width.get(plan.dtype, 1)
            writer.write_raw(name, 0, np.full(count, fill, np.uint8))
        (writer.folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


BY_TENSORS = {
    "GPTQ": {f"{Q}.qweight": ("I32", (1, 8)), f"{Q}.qzeros": ("I32", (1, 1)),
             f"{Q}.scales": ("F16", (1, 8)), f"{Q}.g_idx": ("I32", (8,))},
    "AWQ": {f"{Q}.qweight": ("I32", (8, 1)), f"{Q}.scales": ("F16", (1, 8))},
    "bitsandbytes 4 bit": {f"{Q}.weight": ("U8", (32, 1)), f"{Q}.weight.absmax": ("F32", (1,)),
                           f"{Q}.weight.quant_map": ("F32", (16,)),
                           f"{Q}.weight.quant_state.bitsandbytes__nf4": ("U8", (80,))},
    "bitsandbytes 8 bit": {f"{Q}.weight": ("I8", (8, 8)), f"{Q}.SCB": ("F32", (8,))},
    "FP8": {f"{Q}.weight": ("F8_E4M3", (8, 8)), f"{Q}.weight_scale_inv": ("F32", (1, 1))},
    "compressed-tensors": {f"{Q}.weight_packed": ("I32", (8, 1)),
                           f"{Q}.weight_scale": ("BF16", (8, 1)),
                           f"{Q}.weight_shape": ("I64", (2,))},
    "INT8, compressed-tensors": {f"{Q}.weight": ("I8", (8, 8)),
                                 f"{Q}.weight_scale": ("F32", (8, 1))},
    "Marlin": {f"{Q}.B": ("I32", (1, 16)), f"{Q}.s": ("F16", (1, 8))},
    "compressed-tensors, sparse": {f"{Q}.compressed": ("BF16", (32,)),
                                   f"{Q}.bitmask": ("U8", (8, 1)), f"{Q}.shape": ("I64", (2,))},
    "torchao": {f"{Q}.weight_qdata": ("I8", (8, 8)), f"{Q}.weight_scale": ("F32", (8, 1))},
    "HQQ": {f"{Q}.W_q": ("U8", (8, 8)), f"{Q}.scale": ("F16", (8, 1)),
            f"{Q}.zero": ("F16", (8, 1))},
    "EETQ": {f"{Q}.weight": ("I8", (8, 8)), f"{Q}.weight_scales": ("F16", (8,))},
    "quanto": {f"{Q}.weight._data": ("I8", (8, 8)), f"{Q}.weight._scale": ("F32", (8, 1))},
    "MLX": {f"{Q}.weight": ("U32", (8, 1)), f"{Q}.scales": ("F16", (8, 1)),
            f"{Q}.biases": ("F16", (8, 1))},
    "MXFP4": {f"{E}.down_proj_blocks": ("U8", (2, 8, 1, 16)),
              f"{E}.down_proj_scales": ("U8", (2, 8, 1))},
    "BitNet": {f"{Q}.weight": ("U8", (2, 8)), f"{Q}.weight_scale": ("BF16", (1,))},
    "EXL2": {f"{Q}.q_weight": ("I32", (1, 8)), f"{Q}.q_groups": ("I16", (2,))},
    "AQLM": {f"{Q}.codes": ("I8", (8, 1, 1)), f"{Q}.codebooks": ("F16", (1, 256, 1, 8))},
    "VPTQ": {f"{Q}.indices": ("I32", (1, 8, 1)), f"{Q}.centroids.weight": ("F16", (1, 256))},
    "NVFP4": {f"{Q}.weight": ("U8", (8, 4)), f"{Q}.weight_scale": ("F8_E4M3", (8, 1)),
              f"{Q}.weight_scale_2": ("F32", ()), f"{Q}.input_scale": ("F32", ())},
    "SpQR": {f"{Q}.dense_weights": ("I64", (16,)), f"{Q}.row_offsets": ("I32", (9,))},
    # Numbers that are codes: packed by HQQ, or FP8 that was cast and kept its scales.
    "HQQ: tensor": {f"{Q}.W_q": ("F32", (8, 1)), f"{Q}.scale": ("F16", (8, 1)),
            f"{Q}.zero": ("F16", (8, 1))},
    "codes with scales": {f"{Q}.weight": ("F16", (8, 8)), f"{Q}.weight_scale_inv": ("F32", (1, 1))},
    # Of no known tool: integers under a weight's name, or beside scales.
    "U32 weights": {f"{Q}.weight_codes": ("U32", (8, 8)), f"{Q}.scale": ("F32", (1,))},
    "U8 weights": {f"{Q}.weight": ("U8", (32, 1))},
    "I8 weights": {f"{E}.gate_up_proj": ("I8", (2, 8, 8)),
                   f"{E}.gate_up_proj_scale": ("F32", (2, 8))},
}  # fmt: skip


@pytest.mark.parametrize("kind", BY_TENSORS)
def test_codes_are_seen_by_the_tensors_alone(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "q", BY_TENSORS[kind])
    with pytest.raises(QuantisedError, match="full-precision") as refused:
        open_checkpoint(folder)
    assert kind in str(refused.value) and refused.value.reason == "quantised"
    # Without its configuration, and where every weight is one.
    with pytest.raises(QuantisedError):
        open_checkpoint(
            write(tmp_path / "alone", BY_TENSORS[kind], base=False) / "model.safetensors"
        )


BY_CONFIG = {
    "GPTQ, 4 bit": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "bitsandbytes, 4 bit": {"quantization_config": {"load_in_4bit": True}},
    "bitsandbytes, 8 bit": {"quantization_config": {"quant_method": "bitsandbytes",
                                                    "load_in_8bit": True}},
    "FP8": {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    "AWQ, 4 bit": {"thinker": {"text_config": {"quantization_config":
                                               {"quant_method": "awq", "bits": 4}}}},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors"}},
    "ChatGLM, 4 bit": {"quantization_bit": 4},
    "MLX, 4 bit": {"quantization": {"group_size": 64, "bits": 4}},
    "nobody-knows-it": {"quantization_config": {"quant_method": "nobody-knows-it"}},
}  # fmt: skip


@pytest.mark.parametrize("kind", BY_CONFIG)
def test_a_configuration_that_says_quantised_is_believed(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "q", {f"{Q}.weight": ("F32", (8, 8))}, BY_CONFIG[kind])
    with pytest.raises(QuantisedError, match="its tensors are floating point") as refused:
        open_checkpoint(folder)
    assert kind in str(refused.value)
    # Its remedy works.
    (folder / "config.json").write_text("{}")
    open_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("quantize_config.json", '{"bits": 4, "group_size": 128, "desc_act": false}'),
        ("quant_config.json", '{"zero_point": true, "q_group_size": 128, "w_bit": 4}'),
        ("hf_quant_config.json", '{"quantization": {"quant_algo": "NVFP4"}}'),
        ("params.json", '{"dim": 8, "quantization": {"qformat_weight": "fp8_e4m3"}}'),
    ],
)
def test_a_quantisers_own_file_is_believed(file: str, text: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "q", {f"{Q}.weight": ("F32", (8, 8))})
    (folder / file).write_text(text)
    with pytest.raises(QuantisedError, match=f"{file} says"):
        open_checkpoint(folder)


def test_gguf_files_and_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF\x03")
    for path in (tmp_path, tmp_path / "model-Q4_K_M.gguf"):
        with pytest.raises(QuantisedError, match="GGUF"):
            open_checkpoint(path)


def test_integers_that_are_no_weights_are_no_codes(tmp_path: Path) -> None:
    """Positions, counters, masks, indices; scales of layers; switched-off bitsandbytes."""
    buffers = {
        "embeddings.position_ids": ("I64", (1, 8)), "bn.num_batches_tracked": ("I64", ()),
        "h.0.attn.bias": ("U8", (1, 1, 8, 8)), "h.1.attn.bias": ("BOOL", (1, 1, 8, 8)),
        "attn.relative_position_index": ("I64", (8, 8)), "attn.logit_scale": ("F32", (4, 1, 1)),
        "router.scale": ("F32", (8,)), "router.tid2eid": ("I32", (8, 2)),
        "layer._extra_state": ("U8", (16,)), "freqs_cis": ("C64", ()),
    }  # fmt: skip
    off = {"quantization_config": {"load_in_4bit": False, "load_in_8bit": False}}
    assert len(open_checkpoint(write(tmp_path / "f", buffers, off)).names) == len(buffers) + 1
    assert (
        declared_in(
            {
                "quantization_config": {},
                "quantization_bit": 0,
                "vision_config": {"quantization": None},
            }
        )
        is None
    )


@pytest.fixture(params=["FP8", "bitsandbytes 4 bit"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A full-precision base and a quantised model."""
    base = write(tmp_path / "base", {f"{Q}.weight": ("F32", (8, 8))})
    return base, write(tmp_path / "q", BY_TENSORS[request.param])


def test_every_command_refuses_them(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, quantised = pair
    update, data = tmp_path / "u.dare", tmp_path / "d.csv"
    data.write_text("text\nhello\n")
    assert command(capsys, "diff", base, base, "-o", update)[0] == 0
    for words in (
        ("merge", quantised, base, "-o", tmp_path / "o"),
        ("merge", base, quantised, "-o", tmp_path / "o"),
        ("diff", base, quantised, "-o", tmp_path / "o.dare"),
        ("diff", quantised, base, "-o", tmp_path / "o.dare"),
        ("apply", quantised, update, "-o", tmp_path / "o"),
        ("diagnose", base, quantised),
        ("diagnose", quantised, quantised),
        ("statistics", quantised, "--data", data, "-o", tmp_path / "o.safetensors"),
        ("run", "-o", tmp_path / "o", "-c", f"model={quantised}"),
        ("run", "-o", tmp_path / "o", "-c", f"initial={quantised / 'model.safetensors'}"),
    ):
        status, said = command(capsys, *words)
        assert status == 1 and "is quantised" in said and "full-precision" in said, said
        assert "safe" not in said.replace("safetensors", "") and said.count("\n") == 1
        assert not list(tmp_path.glob("o*"))
