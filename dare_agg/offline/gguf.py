"""GGUF files of llama.cpp as Hugging Face folders, by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dare_agg.errors import ConfigError


def folder_from_gguf(file: Path, folder: Path, dtype: str = "float32") -> None:
    """Write the model of a GGUF file, dequantised, with its tokenizer, into a folder.

    Raises `ConfigError` where transformers does not know its architecture, or has to draw a
    tensor at random because the file lacks it.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ConfigError(
            "GGUF files need torch and transformers; install dare-agg[train]"
        ) from error
    logging.disable_progress_bar()
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=getattr(torch, dtype),
            output_loading_info=True,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"{str(file)!r} cannot be read as GGUF: {' '.join(str(error).split())[:200]}; the "
            "packages gguf and accelerate are needed, and an architecture transformers knows"
        ) from error
    model, loading = read
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ConfigError(
            f"{str(file)!r} lacks {missing[0]!r} ({len(missing)} tensors in all), as transformers "
            "reads it; give the full-precision model"
        )
    # What was read is plain numbers now; transformers would refuse to save "quantised" weights.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
