"""config.json says which dtype the tensors beside it have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dare_agg.checkpoint import TensorPlan, state_dtype
from tests.tiny import command, llama

TEXT, VISION, AUDIO = "model.language_model.w", "model.visual.w", "audio_tower.w"


def stated(folder: Path, config: Any, **dtypes: str) -> Any:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    sizes = {TEXT: (9,), VISION: (3,), AUDIO: (2,)}
    named = {"text": TEXT, "vision": VISION, "audio": AUDIO}
    plans = {named[part]: TensorPlan(word, sizes[named[part]]) for part, word in dtypes.items()}
    state_dtype(folder, {**plans, "position_ids": TensorPlan("I64", (99,))})
    text = (folder / "config.json").read_text()
    return json.loads(text) if isinstance(config, dict) else text


def test_every_place_that_states_a_dtype_states_the_tensors(tmp_path: Path) -> None:
    config = {
        "dtype": "float32", "torch_dtype": "torch.float32", "hidden_size": 8,
        "text_config": {"torch_dtype": "float32", "more_config": {"dtype": "float16"}},
        "vision_config": {"dtype": "float32"}, "mamba_ssm_dtype": "float32",
    }  # fmt: skip
    assert stated(tmp_path, config, text="BF16", vision="BF16") == {
        "dtype": "bfloat16", "torch_dtype": "bfloat16", "hidden_size": 8,
        "text_config": {"torch_dtype": "bfloat16", "more_config": {"dtype": "bfloat16"}},
        "vision_config": {"dtype": "bfloat16"}, "mamba_ssm_dtype": "float32",
    }  # fmt: skip


def test_parts_of_other_dtypes_state_their_own(tmp_path: Path) -> None:
    parts = {"text_config": {"dtype": "float32"}, "vision_config": {"dtype": "bfloat16"}}
    found = stated(tmp_path, {"dtype": "float32", **parts}, text="BF16", vision="F32", audio="F16")
    assert found == {
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16"},
        "vision_config": {"dtype": "float32"},
    }


@pytest.mark.parametrize(
    "config",
    [
        '{"hidden_size":8}',
        '{"dtype":"bfloat16"}',
        '{"torch_dtype":"torch.bfloat16"}',
        '{"dtype":"auto","torch_dtype":null}',
        '["dtype"]',
        "no JSON",
    ],
)
def test_what_is_true_or_not_stated_keeps_its_bytes(config: str, tmp_path: Path) -> None:
    assert stated(tmp_path, config, text="BF16", vision="F32") == config
    (tmp_path / "config.json").unlink()
    state_dtype(tmp_path, {})
    assert not (tmp_path / "config.json").exists()


def test_a_merge_and_an_applied_update_load_in_the_dtype_they_are_written_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base, tuned = llama(tmp_path / "base"), llama(tmp_path / "tuned", 1)
    for word, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        merged = tmp_path / word
        assert command(capsys, "merge", base, tuned, "-o", merged, "--dtype", word)[0] == 0
        model = AutoModelForCausalLM.from_pretrained(merged)
        assert model.dtype == dtype and {p.dtype for p in model.parameters()} == {dtype}
    update = tmp_path / "u.dare"
    assert command(capsys, "diff", base, tuned, "-o", update)[0] == 0
    words = ("apply", base, update, "-o", tmp_path / "applied", "--dtype", "bfloat16")
    assert command(capsys, *words)[0] == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "applied").dtype == torch.bfloat16
