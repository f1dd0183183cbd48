"""Adapters on models whose names or modules differ between disk and memory, against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.offline.test_adapters import rename
from tests.tiny import command, tensors, worst

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION),
        image_token_index=5, vision_feature_layer=-1,
    )  # fmt: skip
    return Llava(config)


def qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig
    from transformers import Qwen2VLForConditionalGeneration as Qwen2VL

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4,
              "mlp_ratio": 2}  # fmt: skip
    return Qwen2VL(
        Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    )


def gemma3() -> Any:
    from transformers import Gemma3Config
    from transformers import Gemma3ForConditionalGeneration as Gemma3

    config = Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "sliding_window": 16}, vision_config=VISION,
        mm_tokens_per_image=4, image_token_index=5, boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    return Gemma3(config)


def as_before(name: str) -> str:
    """LLaVA's and Gemma's names in memory before transformers 4.52."""
    rest = name.removeprefix("base_model.model.")
    if rest.startswith("model.language_model."):
        rest = rest.replace("model.language_model.", "language_model.model.", 1)
    elif rest.startswith("lm_head."):
        rest = f"language_model.{rest}"
    rest = rest.removeprefix("model.").replace("vision_tower.encoder", "vision_tower.vision_model"
                                               ".encoder")  # fmt: skip
    return f"base_model.model.{rest}"


def qwen_before(name: str) -> str:
    """Qwen2-VL's names in memory before transformers 4.52."""
    rest = name.removeprefix("base_model.model.")
    rest = rest.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
    return f"base_model.model.{rest}"


@pytest.mark.parametrize(
    ("make", "before"),
    [(llava, as_before), (qwen2_vl, qwen_before), (gemma3, as_before)],
    ids=["llava", "qwen2-vl", "gemma3"],
)
@pytest.mark.parametrize("dora", [False, True])
def test_a_vision_language_adapter_is_merged_on_its_own_base(
    tmp_path: Path, capsys: Any, make: Callable[[], Any], before: Callable[[str], str], dora: bool
) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    plain = make()
    load = type(plain).from_pretrained
    plain.save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_dora=dora)
    _save_trained(get_peft_model(load(tmp_path / "base"), settings), tmp_path / "a")
    whole = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "a").merge_and_unload()
    whole.save_pretrained(tmp_path / "right")
    right = tensors(tmp_path / "right")
    for out in ("now", "before"):
        words = ("merge", tmp_path / "base", tmp_path / "a", "-o", tmp_path / out)
        status, said = command(capsys, *words)
        assert status == 0, said
        assert worst(tensors(tmp_path / out), right) < 1e-6
        rename(tmp_path / "a", before)


def _save_trained(model: Any, folder: Path) -> None:
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1e-2 * torch.randn_like(parameter)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["self_attn", "linear1"]},
        {"target_modules": ["self_attn"], "use_rslora": True},
        {"target_modules": ["self_attn"], "rank_pattern": {"self_attn": 2},
         "alpha_pattern": {"self_attn": 3}},
        {"target_modules": ["self_attn", "linear2"], "bias": "all"},
        {"target_modules": ["linear2"], "modules_to_save": ["self_attn"]},
    ],
)  # fmt: skip
def test_attentions_of_torch_itself_are_merged(
    tmp_path: Path, capsys: Any, settings: dict[str, Any]
) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import save_file

    def encoder() -> Any:
        torch.manual_seed(0)
        return torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(16, 2, 24), 2, enable_nested_tensor=False
        )

    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({n: v.clone() for n, v in encoder().state_dict().items()}, base)
    config = LoraConfig(r=4, lora_alpha=6, **settings)
    _save_trained(get_peft_model(encoder(), config), tmp_path / "a")
    whole = PeftModel.from_pretrained(encoder(), tmp_path / "a").merge_and_unload()
    status, said = command(capsys, "merge", base, tmp_path / "a", "-o", out)
    assert status == 0, said
    assert worst(tensors(out), {n: v.numpy() for n, v in whole.state_dict().items()}) < 1e-6


def test_embeddings_that_the_base_shares_are_named(tmp_path: Path, capsys: Any) -> None:
    """T5's decoder reads the encoder's embeddings: the adapter is no other model's."""
    from peft import LoraConfig, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=["q", "decoder.embed_tokens"])
    _save_trained(get_peft_model(loaded, settings), tmp_path / "a")
    words = ("merge", tmp_path / "base", tmp_path / "a", "-o", tmp_path / "out")
    status, said = command(capsys, *words)
    assert status == 1 and "one tensor for all" in said and said.count("\n") == 1
    pattern = said[said.index("--exclude") :].split()[1].strip("'")
    assert command(capsys, *words, "--exclude", pattern)[0] == 0
