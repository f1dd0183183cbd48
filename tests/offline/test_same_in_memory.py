"""Models saved as they lay in memory, whose names on disk are others: the mean, loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import command

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def swin() -> Any:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    return SwinForImageClassification(config)


def detr() -> Any:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        out_features=["stage2"],
    )  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, num_queries=4,
    )  # fmt: skip
    return DetrForObjectDetection(config)


def granite_moe() -> Any:
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    config = GraniteMoeConfig(
        vocab_size=64, intermediate_size=48, num_key_value_heads=2, num_local_experts=2, **SIZES
    )
    return GraniteMoeForCausalLM(config)


def mamba() -> Any:
    """All its layers begin with one A_log."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2)
    return MambaForCausalLM(config)


@pytest.mark.parametrize("make", [swin, detr, granite_moe, mamba])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_out_is_the_mean_of_what_transformers_loads(
    tmp_path: Path, capsys: Any, make: Callable[[], Any], wrapper: str
) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    base = make()
    load = type(base).from_pretrained
    base.save_pretrained(tmp_path / "base")
    models = []
    for name in ("disk", "memory"):
        model = load(tmp_path / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1e-2 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
        models.append({n: v.clone() for n, v in model.state_dict().items()})
    raw = {wrapper + n: v for n, v in models[1].items()}
    save_file(raw, tmp_path / "memory" / "model.safetensors", {"format": "pt"})
    words = (tmp_path / "base", tmp_path / "disk", tmp_path / "memory", "-o", tmp_path / "out")
    status, said = command(capsys, "merge", *words, "--method", "average")
    assert status == 0, said
    out, told = load(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    for name, value in out.state_dict().items():
        if value.is_floating_point():
            right = (models[0][name] + models[1][name]) / 2
            assert float((value - right).abs().max()) < 1e-6
