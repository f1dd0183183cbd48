"""Adapters as they are exported: PEFT loads and merges them into our merged model."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from client.config import configure
from client.training import build_task
from dare_agg.errors import ConfigError
from dare_agg.offline.adapters.serving import vllm_word
from server.config import DEFAULTS
from server.export import export_model


def exported(model, data, out, **words):
    """The folder of a run that ends with each adapter tensor moved at random."""
    settings = {
        "model": str(model), "data": str(data["csv"]), "text_column": "review",
        "label_column": "tone", "length": 12, "train": "lora", "lora_rank": 2, **words,
    }  # fmt: skip
    task = build_task(configure(**settings))
    rng = np.random.default_rng(0)
    state = {
        name: (array + 0.05 * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in task.initial_state().items()
    }
    run = {**DEFAULTS, **{key.replace("_", "-"): value for key, value in settings.items()}}
    facts = {"config": run, "base_fingerprint": "0"}
    export_model(out, state, model=str(model), labels=("a", "b"), provenance=facts)
    return state, out


WAYS = {
    "usual": {},
    "names": {"lora_targets": "q_proj,down_proj"},
    "pattern": {"lora_targets": r"model\.layers\.1\.(self_attn|mlp)\.\w+_proj"},
    "all-linear": {"lora_targets": "all-linear"},
    "alpha": {"lora_targets": "v_proj,gate_proj", "lora_alpha": 3},
    "rslora": {"lora_rslora": True},
    "dora": {"lora_dora": True, "lora_targets": "all-linear"},
    "whole": {"lora_whole": "norm,post_attention_layernorm"},
}


@pytest.mark.parametrize("way", WAYS)
def test_peft_loads_the_adapter_and_merges_it_into_our_model(
    tiny_language_model, review_files, tmp_path, way
):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, out = exported(
        tiny_language_model, review_files, tmp_path / "out", task="causal-lm", **WAYS[way]
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_language_model, dtype=torch.float32)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    adapted = PeftModel.from_pretrained(base, out / "adapter")
    config = adapted.peft_config["default"]
    assert config.base_model_name_or_path == str(tiny_language_model)
    merged = dict(adapted.merge_and_unload().named_parameters())
    ours = dict(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).named_parameters())
    assert merged.keys() == ours.keys() == before.keys()
    moved = {n for n in ours if not torch.equal(ours[n], before[n])}
    assert moved and all(torch.allclose(merged[n], ours[n], rtol=0, atol=1e-6) for n in ours)
    assert (len(moved) == 7) == (way == "pattern")  # of the second layer alone


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_were_freed_are_in_the_adapter(tiny_model, review_files, tmp_path, bias):
    import torch
    from peft import PeftModel
    from transformers import AutoModel

    state, out = exported(tiny_model, review_files, tmp_path / "out", lora_bias=bias)
    freed = {n for n in state if n.endswith(".bias") and n != "head.bias"}
    assert all(".query." in n or ".value." in n for n in freed) == (bias == "lora_only") and freed
    ours = dict(AutoModel.from_pretrained(out, dtype=torch.float32).named_parameters())
    base = AutoModel.from_pretrained(tiny_model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload()
    for name, value in merged.named_parameters():
        if bias == "all" or not name.endswith(".bias"):
            assert torch.allclose(value, ours[name], rtol=0, atol=1e-6), name
    query = "encoder.layer.0.attention.self.query.bias"
    moved = state[f"encoder.base_model.model.{query.replace('bias', 'base_layer.bias')}"]
    assert np.array_equal(ours[query].detach().numpy(), moved)


def test_the_file_has_vllms_names_and_one_line_says_what_it_would_refuse(
    tiny_language_model, review_files, tmp_path
):
    usual = {"task": "causal-lm"}
    _, out = exported(tiny_language_model, review_files, tmp_path / "plain", **usual)
    names = load_file(out / "adapter" / "adapter_model.safetensors")
    assert set(names) == {
        f"base_model.model.model.layers.{layer}.self_attn.{proj}.lora_{factor}.weight"
        for layer in (0, 1) for proj in ("q_proj", "v_proj") for factor in "AB"
    }  # fmt: skip
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["target_modules"] == ["q_proj", "v_proj"]
    said = vllm_word(out / "adapter")
    assert said.startswith("vLLM takes it: --enable-lora --lora-modules")
    assert (
        "vLLM takes it: --enable-lora --lora-modules NAME=adapter"
        in (out / "README.md").read_text()
    )
    for way, words in {
        "dora": "DoRA is not served",
        "whole": "modules saved whole (model.layers.0.input_layernorm, ",
    }.items():
        _, out = exported(tiny_language_model, review_files, tmp_path / way, **usual, **WAYS[way])
        assert words in vllm_word(out / "adapter"), way
    _, out = exported(tiny_language_model, review_files, tmp_path / "wide", **usual, lora_rank=32,
                      lora_targets="q_proj")  # fmt: skip
    assert "rank 32 is above 16: start it with --max-lora-rank 32" in vllm_word(out / "adapter")
    assert "takes it" in vllm_word(out / "adapter", 32)
    with pytest.raises(ConfigError, match="max-lora-rank = 20; vLLM takes 1, 8"):
        vllm_word(out / "adapter", 20)


def test_a_module_of_another_rank_has_it_in_the_patterns(tmp_path):
    from server.adapters import adapter_config

    tensors = {
        f"base_model.model.m.{n}.lora_{factor}.default.weight": np.zeros(shape, np.float32)
        for n, rank in (("p", 4), ("q", 4), ("r", 2))
        for factor, shape in (("A", (rank, 8)), ("B", (8, rank)))
    }
    words = {"model": "base", "base": None, "language": True}
    run = {"lora-rank": 4, "lora-alpha": 8}
    found = adapter_config(tensors, run, **words)
    assert found["rank_pattern"] == {"m.r": 2} and found["alpha_pattern"] == {"m.r": 4.0}
    assert found["target_modules"] == ["m.p", "m.q", "m.r"]
    root = adapter_config(tensors, {**run, "lora-rslora": True}, **words)
    assert root["alpha_pattern"]["m.r"] / np.sqrt(2) == pytest.approx(8 / np.sqrt(4))


def test_inspect_says_what_vllm_would_refuse(tiny_language_model, review_files, tmp_path, capsys):
    from tests.tiny import command

    words = {"task": "causal-lm", "lora_rank": 32, "lora_targets": "q_proj"}
    _, out = exported(tiny_language_model, review_files, tmp_path / "out", **words)
    status, said = command(capsys, "inspect", out / "adapter")
    assert status == 0 and "rank: 32" in said and f"base: {tiny_language_model}" in said
    assert "vllm: vLLM would refuse it: rank 32 is above 16: start it with" in said
    status, said = command(capsys, "inspect", out / "adapter", "--max-lora-rank", 64, "--json")
    assert status == 0 and json.loads(said)["vllm"].startswith("vLLM takes it: --enable-lora")
    status, said = command(capsys, "inspect", out / "adapter", "--max-lora-rank", 33)
    assert status != 0 and "vLLM takes 1, 8, 16" in said
