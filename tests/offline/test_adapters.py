"""Adapters against PEFT: what `merge_and_unload` makes of them on the CPU, to 1e-6."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import command, llama, rewrite, tensors, worst

LINEAR = ["q_proj", "v_proj", "down_proj"]
# Settings of one adapter over the tiny Llama; "noise" moves all that it trains from where it began.
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias of LoRA alone": {"bias": "lora_only"},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"v_proj": 2, "layers.1.*down_proj": 6},
        "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.q_proj": 7},
    },
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa and rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "embeddings and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole embeddings": {"modules_to_save": ["embed_tokens"]},
    "layers chosen": {"layers_to_transform": [1]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 60, 7]}},
}


@contextmanager
def exact_svd() -> Iterator[None]:
    """PEFT's singular vectors in float64: in float32 those of near values differ from processor to
    processor, and what PiSSA takes out of the base by more than 1e-6."""
    import torch

    usual = torch.linalg.svd

    def exact(matrix: Any, *words: Any, **more: Any) -> Any:
        return tuple(found.to(matrix.dtype) for found in usual(matrix.double(), *words, **more))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", exact)
        yield


def adapted(base: Path, out: Path, settings: dict[str, Any], make: Any = None) -> dict[str, Any]:
    """Save a trained adapter at ``out``; returns the tensors of PEFT's merged model."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    load = make or AutoModelForCausalLM.from_pretrained
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEAR, **settings})
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1e-2 * torch.randn_like(parameter)
    model.save_pretrained(out)
    with exact_svd():
        whole = PeftModel.from_pretrained(load(base), out).merge_and_unload()
    return {name: value.detach().numpy().copy() for name, value in whole.state_dict().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("adapters") / "base")


Merge = Callable[..., dict[str, Any]]


@pytest.fixture
def merged(tmp_path: Path, capsys: Any) -> Merge:
    def run(*words: object) -> dict[str, Any]:
        status, said = command(capsys, "merge", *words, "-o", tmp_path / "out")
        assert status == 0, said
        return tensors(tmp_path / "out")

    return run


@pytest.fixture
def refused(tmp_path: Path, capsys: Any) -> Callable[..., str]:
    def run(*words: object) -> str:
        status, said = command(capsys, "merge", *words, "-o", tmp_path / "out")
        assert status == 1 and said.count("\n") == 1, said
        return said

    return run


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_lora_is_merged_as_peft_merges_it(
    base: Path, tmp_path: Path, merged: Merge, form: str
) -> None:
    right = adapted(base, tmp_path / "a", FORMS[form])
    ours, before = merged(base, tmp_path / "a"), tensors(base)
    assert worst(before, right) > 1e-4
    assert worst(ours, right) < 1e-6


def test_a_converted_pissa_adapter_is_an_ordinary_one(
    base: Path, tmp_path: Path, merged: Merge
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=4, target_modules=LINEAR, init_lora_weights="pissa"),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1e-2 * torch.randn_like(parameter)
    right = {n: v.clone() for n, v in model.state_dict().items()}
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(
        tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    ours = merged(base, tmp_path / "a")
    name = "model.layers.0.self_attn.q_proj"
    inner = f"base_model.model.{name}"
    product = right[f"{inner}.lora_B.default.weight"] @ right[f"{inner}.lora_A.default.weight"]
    whole = right[f"{inner}.base_layer.weight"] + product
    assert abs(ours[f"{name}.weight"] - whole.numpy()).max() < 1e-6


@pytest.mark.parametrize("kind", ["corda", "pissa_niter_4", "loftq", "lora_ga"])
def test_a_start_that_is_not_in_the_adapter_is_named(
    base: Path, tmp_path: Path, refused: Callable[..., str], kind: str
) -> None:
    adapted(base, tmp_path / "a", {})
    change(tmp_path / "a", init_lora_weights=kind)
    said = refused(base, tmp_path / "a")
    assert "init_lora_weights" in said and kind in said


def change(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rename(adapter: Path, rule: Callable[[str], str]) -> None:
    shutil.copy(adapter / "adapter_model.safetensors", adapter / "model.safetensors")
    rewrite(adapter, lambda t: {rule(name): value for name, value in t.items()})
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")


def test_a_pattern_that_looks_ahead_is_named_with_its_key(
    base: Path, tmp_path: Path, merged: Merge, refused: Callable[..., str]
) -> None:
    pattern = r"model\.layers\.(?!0).*\.q_proj"
    right = adapted(base, tmp_path / "a", {"alpha_pattern": {pattern: 9}})
    assert "alpha_pattern 'model" in (said := refused(base, tmp_path / "a"))
    assert "write the modules' names in its place in adapter_config.json" in said
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["alpha_pattern"] = {"model.layers.1.self_attn.q_proj": 9}
    file.write_text(json.dumps(config))
    assert worst(merged(base, tmp_path / "a"), right) < 1e-6


@pytest.mark.parametrize(
    "rule",
    [
        lambda n: n.replace(".weight", ".default.weight") if "lora" in n else n,
        lambda n: n.removeprefix("base_model.model."),
        lambda n: n.replace("base_model.model.model.", "base_model.model."),
    ],
)
def test_other_spellings_of_its_names_are_the_same_adapter(
    base: Path, tmp_path: Path, merged: Merge, rule: Callable[[str], str]
) -> None:
    right = adapted(base, tmp_path / "a", {})
    rename(tmp_path / "a", rule)
    assert worst(merged(base, tmp_path / "a"), right) < 1e-6


def test_a_trainers_folder_of_one_adapter_is_the_adapter(
    base: Path, tmp_path: Path, merged: Merge
) -> None:
    right = adapted(base, tmp_path / "run" / "checkpoint-100", {})
    assert worst(merged(base, tmp_path / "run"), right) < 1e-6


def test_conv1d_is_known_by_its_shapes_not_by_the_flag(tmp_path: Path, merged: Merge) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)).save_pretrained(
        tmp_path / "base"
    )
    targets = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    right = adapted(tmp_path / "base", tmp_path / "a", targets)
    right.pop("lm_head.weight")
    for flag in (True, False):
        change(tmp_path / "a", fan_in_fan_out=flag)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert worst(merged(tmp_path / "base", tmp_path / "a"), right) < 1e-6


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A body alone, and an adapter of a classifier over it with its head."""
    from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=20,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "base")

    def load(path: Path) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)

    settings = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "bias": "all"}
    return folder / "base", folder / "a", adapted(folder / "base", folder / "a", settings, load)


def test_a_task_head_is_left_out_as_of_checkpoints(
    bert: tuple[Path, Path, dict[str, Any]], merged: Merge, refused: Callable[..., str]
) -> None:
    base, adapter, right = bert
    said = refused(base, adapter)
    assert "'classifier" in said and "task's own head" in said
    words = said[said.index("--exclude") :].split()
    ours = merged(base, adapter, words[0], words[1].strip("'"))
    body = {n.removeprefix("bert."): v for n, v in right.items() if n.startswith("bert.")}
    assert worst(ours, {n: v for n, v in body.items() if n in ours}) < 1e-6


def test_a_resized_vocabulary_is_said_and_the_rest_merges(
    base: Path, tmp_path: Path, merged: Merge, refused: Callable[..., str]
) -> None:
    from transformers import AutoModelForCausalLM

    def resized(path: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path)
        model.resize_token_embeddings(70)
        return model

    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    right = adapted(base, tmp_path / "a", settings, resized)
    said = refused(base, tmp_path / "a")
    assert "a vocabulary of 70 tokens, the base has 64" in said and "another model" not in said
    ours = merged(base, tmp_path / "a", "--exclude", "embed_tokens|lm_head")
    assert worst(ours, {n: v for n, v in right.items() if v.shape[0] != 70}) < 1e-6


def test_a_head_of_its_own_over_a_tied_base_is_said(
    tmp_path: Path, refused: Callable[..., str], merged: Merge
) -> None:
    tied = llama(tmp_path / "base", tie_word_embeddings=True)
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapted(tied, tmp_path / "a", settings)
    said = refused(tied, tmp_path / "a")
    assert "ties" in said and "another model" not in said
    merged(tied, tmp_path / "a", "--exclude", "lm_head")


def test_fused_experts_are_merged(tmp_path: Path, merged: Merge) -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
        max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    settings = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    }
    adapted(tmp_path / "base", tmp_path / "a", settings)
    merged(tmp_path / "base", tmp_path / "a")
    right = _peft(tmp_path / "base", tmp_path / "a")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert worst({n: v.numpy() for n, v in ours.items()}, right) < 1e-6


def _peft(base: Path, adapter: Path) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return {n: v.detach().numpy().copy() for n, v in model.merge_and_unload().state_dict().items()}


def test_convolutions_are_merged(tmp_path: Path, merged: Merge) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8,
    )  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["projection", "query", "q_proj"]}
    right = adapted(tmp_path / "base", tmp_path / "a", settings, ViTModel.from_pretrained)
    merged(tmp_path / "base", tmp_path / "a")
    ours = ViTModel.from_pretrained(tmp_path / "out").state_dict()
    assert worst({n: v.numpy() for n, v in ours.items()}, right) < 1e-6


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "PROMPT_TUNING"}, "changes no weight"),
        ({"peft_type": "LILY"}, "depends on the input"),
        ({"use_some_new_form": True}, "a form not known here"),
        ({"peft_type": None}, "peft_type"),
    ],
)
def test_what_is_not_merged_is_named(
    base: Path, tmp_path: Path, refused: Callable[..., str], values: dict[str, Any], word: str
) -> None:
    adapted(base, tmp_path / "a", {})
    change(tmp_path / "a", **values)
    said = refused(base, tmp_path / "a")
    assert word in said and "another model" not in said


@pytest.mark.parametrize("factor", ["lora_A", "lora_down"])
def test_weights_without_their_configuration_are_known(
    base: Path, tmp_path: Path, refused: Callable[..., str], factor: str
) -> None:
    adapted(base, tmp_path / "a", {})
    rename(tmp_path / "a", lambda name: name.replace("lora_A", factor))
    (tmp_path / "a" / "adapter_config.json").unlink()
    said = refused(base, tmp_path / "a" / "adapter_model.safetensors")
    assert "an adapter's weights by themselves" in said and "another model" not in said


def test_the_call_of_peft_names_the_folder_of_a_base_that_is_a_file(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    adapted(base, tmp_path / "a", {})
    change(tmp_path / "a", peft_type="IA3")
    alone = shutil.copy(base / "model.safetensors", tmp_path / "alone.safetensors")
    for file, words in ((base / "model.safetensors", f" {base} {tmp_path / 'a'} "),
                        (alone, "in a folder with its config.json")):  # fmt: skip
        status, said = command(
            capsys, "merge", file, tmp_path / "a", "-o", tmp_path / "out.safetensors"
        )
        assert status == 1 and words in said


def test_an_adapter_of_another_model_is_said(
    tmp_path: Path, bert: tuple[Path, Path, dict[str, Any]], base: Path,
    refused: Callable[..., str],
) -> None:  # fmt: skip
    said = refused(base, bert[1])
    assert "BASE lacks" in said or "another model" in said


def test_an_update_of_an_adapter_is_the_adapter(
    base: Path, tmp_path: Path, merged: Merge, capsys: Any
) -> None:
    right = adapted(base, tmp_path / "a", FORMS["dora"])
    update = tmp_path / "u.dare"
    words = ("diff", base, tmp_path / "a", "-o", update, "--drop-rate", "0", "--values", "f32")
    assert command(capsys, *words)[0] == 0
    assert worst(merged(base, update), right) < 1e-6


@pytest.mark.parametrize("tile", [1000, 7])
def test_the_values_do_not_depend_on_the_tiles(
    base: Path, tmp_path: Path, merged: Merge, tile: int
) -> None:
    adapted(base, tmp_path / "a", {"use_dora": True, "init_lora_weights": "pissa"})
    ours = merged(base, tmp_path / "a", "--tile", tile, "--threads", 2)
    (tmp_path / "out").rename(tmp_path / "first")
    assert worst(ours, merged(base, tmp_path / "a")) == 0
