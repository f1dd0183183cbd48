"""FP8 and GGUF models as plain numbers: those that transformers loads, without a GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dare_agg.checkpoint import CheckpointWriter, TensorPlan, open_checkpoint
from tests.tiny import command, llama, rewrite, tensors

BLOCK = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("fp8") / "base", hidden_size=64, intermediate_size=96)


def quantised(base: Path, folder: Path, block: int | None, scale: str = "weight_scale_inv") -> Path:
    """A copy with FP8 codes for every projection, scaled by block, or one scale a tensor."""
    import torch

    def change(given: dict[str, Any]) -> dict[str, Any]:
        made = {}
        for name, value in given.items():
            if not name.endswith("proj.weight"):
                made[name] = value.to(torch.bfloat16)
                continue
            rows, columns = value.shape
            size = block or max(rows, columns)
            tall, wide = min(size, rows), min(size, columns)
            parts = value.reshape(rows // tall, tall, columns // wide, wide)
            scales = parts.abs().amax((1, 3)) / 448
            codes = (parts / scales[:, None, :, None]).reshape(rows, columns)
            made[name] = codes.to(torch.float8_e4m3fn)
            made[f"{name.removesuffix('weight')}{scale}"] = scales if block else scales.reshape(())
            made[f"{name.removesuffix('weight')}input_scale"] = torch.ones(())
        return made

    shutil.copytree(base, folder)
    rewrite(folder, change)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic",
        "weight_block_size": [block, block] if block else None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("block", [BLOCK, None])
def test_fp8_has_the_values_that_transformers_loads(
    base: Path, block: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    codes, out = quantised(base, tmp_path / "q", block), tmp_path / "o"
    status, said = command(capsys, "merge", base, codes, "-o", out)
    assert status == 1 and f"dare-agg dequantise {codes} -o OUT" in said
    # The remedy works as it is written.
    words = said.rpartition("dare-agg ")[2].replace("OUT", str(out)).split()
    status, said = command(capsys, *words)
    assert status == 0 and "14 tensors of FP8 codes are bfloat16 now" in said
    whole = FineGrainedFP8Config(
        dequantize=True, weight_block_size=(block, block) if block else None
    )
    theirs = AutoModelForCausalLM.from_pretrained(codes, quantization_config=whole).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], theirs[name]), name
    assert not any("scale" in name for name in open_checkpoint(out).names)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert command(capsys, "merge", base, out, "-o", tmp_path / "merged")[0] == 0
    wide = tmp_path / "wide.safetensors"
    assert command(capsys, "dequantise", codes, "-o", wide, "--dtype", "float32")[0] == 0
    exact = tensors(base)["model.layers.0.mlp.up_proj.weight"]
    near = tensors(wide)["model.layers.0.mlp.up_proj.weight"]
    assert 0 < np.abs(near - exact).max() < np.abs(exact).max() / 16


def stored(folder: Path, **named: tuple[str, tuple[int, ...], Any]) -> Path:
    plans = {name.replace("__", "."): TensorPlan(d, s) for name, (d, s, _) in named.items()}
    with CheckpointWriter(folder, plans, {"format": "pt"}) as writer:
        for name, (_, _, data) in named.items():
            writer.write_raw(name.replace("__", "."), 0, np.asarray(data))
    return folder


ONE = np.full(6, 0x38, np.uint8)  # 1.0 in E4M3


@pytest.mark.parametrize(
    ("scale", "values"),
    [
        (("F32", (2, 1), np.array([2, 3], "<f4")), [[2, 2, 2], [3, 3, 3]]),
        (("F32", (2,), np.array([2, 3], "<f4")), [[2, 2, 2], [3, 3, 3]]),
        (("F32", (1,), np.array([5], "<f4")), [[5, 5, 5], [5, 5, 5]]),
        (("BF16", (1, 3), np.array([0x3F80, 0x4000, 0x4040], "<u2")), [[1, 2, 3], [1, 2, 3]]),
        (("F8_E8M0", (2, 1), np.array([127, 129], "u1")), [[1, 1, 1], [4, 4, 4]]),
        (("U8", (2, 3), np.array([127, 128, 129, 126, 127, 127], "u1")), [[1, 2, 4], [0.5, 1, 1]]),
    ],
)
@pytest.mark.parametrize(
    "name", ["a__weight_scale", "a__weight_scale_inv", "a__scale_inv", "a__scale_weight"]
)
def test_scales_of_every_shape_multiply(
    scale: Any, values: Any, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stored(tmp_path / "q", a__weight=("F8_E4M3", (2, 3), ONE), **{name: scale})
    assert command(capsys, "dequantise", folder, "-o", tmp_path / "o")[0] == 0
    assert tensors(tmp_path / "o")["a.weight"].tolist() == values


def test_a_last_block_that_is_not_whole_is_as_long_as_the_configuration_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """6 columns in blocks of 4: a grid of two scales alone would say blocks of 3."""
    scales = np.array([2, 3], "<f4")
    folder = stored(
        tmp_path / "q",
        a__weight=("F8_E4M3", (1, 6), ONE),
        a__weight_scale_inv=("F32", (1, 2), scales),
    )
    settings = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    assert command(capsys, "dequantise", folder, "-o", tmp_path / "o")[0] == 0
    assert tensors(tmp_path / "o")["a.weight"].tolist() == [[2, 2, 2, 2, 3, 3]]


def test_fused_experts_and_shards_keep_their_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = {
        "e.up_proj": TensorPlan("F8_E5M2", (2, 2, 2), "model-00001-of-00002.safetensors"),
        "e.up_proj_scale": TensorPlan("F32", (2, 1, 2), "model-00002-of-00002.safetensors"),
        "norm": TensorPlan("F32", (3,), "model-00002-of-00002.safetensors"),
    }
    with CheckpointWriter(tmp_path / "q", plans, {"format": "pt"}) as writer:
        writer.write_raw("e.up_proj", 0, np.full(8, 0x3C, np.uint8))  # 1.0 in E5M2
        writer.write("e.up_proj_scale", 0, np.array([1, 2, 3, 4], np.float32))
        writer.write("norm", 0, np.ones(3, np.float32))
    assert command(capsys, "dequantise", tmp_path / "q", "-o", tmp_path / "o")[0] == 0
    model = open_checkpoint(tmp_path / "o")
    assert len(model.files) == 2 and model.dtypes == {"e.up_proj": "BF16", "norm": "F32"}
    assert model.array("e.up_proj").tolist() == [[[1, 2], [1, 2]], [[3, 4], [3, 4]]]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"a__weight_scale": ("F32", (3,), np.ones(3, "<f4"))}, "do not fit 'a.weight'"),
        ({"a__weight_scale": ("I32", (1,), np.ones(1, "<i4"))}, "are of I32"),
        ({"a__odd_scaler": ("F32", (1,), np.ones(1, "<f4"))}, "how it scales them is not known"),
        ({"b__qweight": ("I32", (2,), np.ones(2, "<i4"))}, "is quantised"),
    ],
)
def test_what_is_not_understood_is_refused(
    extra: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stored(tmp_path / "q", a__weight=("F8_E4M3", (2, 3), ONE), **extra)
    status, words = command(capsys, "dequantise", folder, "-o", tmp_path / "o")
    assert status == 1 and said in words and "full-precision" in words
    assert words.count("\n") == 1 and not (tmp_path / "o").exists()


def test_codes_without_scales_are_numbers_where_nobody_speaks_of_scales(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stored(tmp_path / "q", a__weight=("F8_E4M3", (2, 3), ONE))
    assert command(capsys, "dequantise", folder, "-o", tmp_path / "o")[0] == 0
    assert tensors(tmp_path / "o")["a.weight"].tolist() == [[1, 1, 1], [1, 1, 1]]
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    status, said = command(capsys, "dequantise", folder, "-o", tmp_path / "p")
    assert status == 1 and "no scale stands beside the codes 'a.weight'" in said


def test_comfyuis_marker_and_scales_of_inputs_stay_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = np.array([2], "<f4")
    folder = stored(
        tmp_path / "q", a__weight=("F8_E4M3", (2, 3), ONE), a__scale_weight=("F32", (1,), two),
        a__scale_input=("F32", (1,), two), scaled_fp8=("F8_E4M3", (2,), ONE[:2]),
    )  # fmt: skip
    assert command(capsys, "dequantise", folder, "-o", tmp_path / "o")[0] == 0
    assert {n: a.tolist() for n, a in tensors(tmp_path / "o").items()} == {
        "a.weight": [[2] * 3] * 2
    }


def test_a_model_of_numbers_and_codes_of_other_kinds_say_so(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = command(capsys, "dequantise", base, "-o", tmp_path / "o")
    assert status == 1 and "is not quantised; merge it as it is" in said
    gptq = stored(tmp_path / "g", a__qweight=("I32", (2,), np.ones(2, "<i4")))
    status, said = command(capsys, "dequantise", gptq, "-o", tmp_path / "o")
    assert status == 1 and "GPTQ" in said and "dequantise" not in said


def gguf_file(base: Path, file: Path) -> dict[str, Any]:
    """Write a Llama as llama.cpp does, embeddings in Q8_0; returns the values that they have."""
    import gguf

    config, given = json.loads((base / "config.json").read_text()), tensors(base)
    writer = gguf.GGUFWriter(file, "llama")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    words = ["<unk>", "<s>", "</s>", *(chr(97 + n // 8) * (1 + n % 8) for n in range(61))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(n) for n in range(64)])
    writer.add_token_types([2, 3, 3, *(1 for _ in range(61))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "model.layers.": "blk.",
    }  # fmt: skip
    for name, value in given.items():
        for long, short in names.items():
            name = name.replace(long, short)
        for part, count in (("attn_q", heads), ("attn_k", groups)):
            if part in name:  # as llama.cpp keeps rotary pairs
                halves = value.reshape(count, 2, -1, value.shape[1])
                value = halves.swapaxes(1, 2).reshape(value.shape)
        if "token_embd" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
            given = given | {
                "model.embed_tokens.weight": gguf.quants.dequantize(
                    gguf.quants.quantize(value, kind), kind
                )
            }
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return given


def test_gguf_has_the_values_that_it_was_made_from(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "q"
    folder.mkdir()
    right = gguf_file(base, folder / "tiny-Q8_0.gguf")
    status, said = command(capsys, "diff", base, folder, "-o", tmp_path / "u.dare")
    assert status == 1 and "dare-agg dequantise" in said
    out = tmp_path / "o"
    words = said.rpartition("dare-agg ")[2].replace("OUT", str(out)).split()
    status, said = command(capsys, *words)
    assert status == 0, said
    ours = tensors(out)
    assert ours.keys() == right.keys()
    for name in ours:
        assert np.array_equal(ours[name], right[name]), name
    table = "model.embed_tokens.weight"
    assert not np.array_equal(ours[table], tensors(base)[table])
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 2
    assert command(capsys, "merge", base, out, "-o", tmp_path / "m")[0] == 0
    (folder / "other.gguf").write_bytes(b"GGUF")
    status, said = command(capsys, "dequantise", folder, "-o", out, "--force")
    assert status == 1 and "has 2 GGUF files; give one" in said and (out / "config.json").exists()
