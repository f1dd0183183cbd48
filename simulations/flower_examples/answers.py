"""What flowertune-llm's last model is worth: the example itself evaluates nothing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord

from simulations.flower_examples.apps import App
from simulations.flower_examples.data import tweets


def answers_right(arrays: ArrayRecord, config: Mapping[str, Any], app: App, folder: Path) -> float:
    """Share of the test tweets whose author the model holds for the likelier of the two."""
    import torch
    from flwr.common.config import unflatten_dict
    from omegaconf import DictConfig
    from peft import set_peft_model_state_dict

    example = importlib.import_module("flowertune_llm.dataset")
    models = importlib.import_module("flowertune_llm.models")
    settings = DictConfig(example.replace_keys(unflatten_dict(dict(config)))).model
    model = models.get_model(settings).eval()
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    words = example.get_tokenizer_and_data_collator_and_propt_formatting(settings.name)[0]
    rows = tweets("test", app.rows[1], folder)
    asked = example.formatting_prompts_func({**rows, "response": [""] * app.rows[1]})
    names = sorted(set(rows["output"]))
    firsts = [words.encode(f" {name}", add_special_tokens=False)[0] for name in names]
    right = 0
    for text, answer in zip(asked, rows["output"], strict=True):
        tokens = words(text.rstrip(), return_tensors="pt").input_ids
        with torch.no_grad():
            last = model(input_ids=tokens).logits[0, -1]
        right += names[int(last[firsts].argmax())] == answer
    return right / len(asked)
