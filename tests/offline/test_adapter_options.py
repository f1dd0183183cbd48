"""Every option of PEFT's LoRA: its merge to 1e-6, or a refusal that says why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from tests.offline.test_adapters import LINEAR, adapted, change
from tests.tiny import command, llama, rewrite, tensors, worst


def block_diagonal(**words: Any) -> Any:
    from peft.tuners.lora.config import BdLoraConfig

    return BdLoraConfig(nblocks=2, match_strict=False, **words)


def settings_of(name: str) -> Any:
    from peft.tuners.lora import config

    return getattr(config, name)()


@dataclass(frozen=True)
class Merged:
    """An option that is merged; ``base`` is the tiny Llama's kind."""

    settings: Mapping[str, Any]
    base: str = "plain"


@dataclass(frozen=True)
class Refused:
    """An option that is refused with ``words``; set in the configuration of a plain adapter."""

    value: Any
    words: str


@dataclass(frozen=True)
class Nothing:
    """An option that changes nothing of what is merged."""

    why: str


# What PEFT's own configuration (of every kind of adapter) holds says nothing of the merge.
COMMON = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
          "revision", "inference_mode"}  # fmt: skip
OPTIONS: dict[str, list[Merged | Refused | Nothing]] = {
    "r": [Merged({"r": 1})],
    "target_modules": [Merged({"target_modules": r".*\.(q|k)_proj"}),
                       Merged({"target_modules": "all-linear"})],
    "exclude_modules": [Merged({"exclude_modules": ["v_proj"]})],
    "lora_alpha": [Merged({"lora_alpha": 0.5})],
    "lora_dropout": [Merged({"lora_dropout": 0.1})],
    "fan_in_fan_out": [Merged({"fan_in_fan_out": True})],
    "bias": [Merged({"bias": "all"}, "biased"), Merged({"bias": "lora_only"}, "biased")],
    "use_rslora": [Merged({"use_rslora": True, "rank_pattern": {"v_proj": 2}})],
    "modules_to_save": [Merged({"modules_to_save": ["mlp", "norm"], "target_modules": ["q_proj"]})],
    "init_lora_weights": [
        Merged({"init_lora_weights": False}), Merged({"init_lora_weights": "mica"}),
        Merged({"init_lora_weights": "eva"}),
        Merged({"init_lora_weights": "pissa", "use_dora": True}),
        Merged({"init_lora_weights": "olora", "target_modules": ["q_proj", "embed_tokens"]}),
        Refused("pissa_niter_4", "training began from a changed base"),
    ],
    "layers_to_transform": [Merged({"layers_to_transform": 0, "layers_pattern": "layers"})],
    "layers_pattern": [Nothing("it belongs to layers_to_transform")],
    "rank_pattern": [Merged({"rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2}})],
    "alpha_pattern": [Merged({"alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2}})],
    "megatron_config": [Merged({"megatron_config": {}})],
    "megatron_core": [Nothing("it belongs to megatron_config")],
    "trainable_token_indices": [
        Merged({"trainable_token_indices": [3, 60, 7]}),
        Merged({"trainable_token_indices": [3, 60, 7]}, "tied"),
        Merged({"trainable_token_indices": [3, 60, 7]}, "twice"),
        Merged({"trainable_token_indices": {"lm_head": [1, 2], "embed_tokens": [5]}}),
    ],
    "loftq_config": [Nothing("it belongs to the start loftq, which is refused")],
    "eva_config": [Nothing("it belongs to the start eva, which leaves the base alone")],
    "corda_config": [Nothing("it belongs to the start corda, which is refused")],
    "lora_ga_config": [Nothing("it belongs to the start lora_ga, which is refused")],
    "use_dora": [Merged({"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]})],
    "velora_config": [Merged({"velora_config": "VeloraConfig"})],
    "alora_invocation_tokens": [Refused([1, 2], "invocation tokens")],
    "use_qalora": [Merged({"use_qalora": True, "qalora_group_size": 8})],
    "qalora_group_size": [Nothing("it belongs to use_qalora")],
    "monteclora_config": [Merged({"monteclora_config": "MontecloraConfig"})],
    "layer_replication": [Refused([[0, 2], [1, 2]], "repeats the same weights")],
    "runtime_config": [Nothing("it says where training is computed")],
    "lora_bias": [Merged({"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, "biased")],
    "target_parameters": [
        Merged({"target_parameters": ["self_attn.q_proj.weight"], "target_modules": ["v_proj"]})
    ],
    "use_bdlora": [
        Merged({"use_bdlora": {"target_modules_bd_a": LINEAR}}),
        Merged({"use_bdlora": {"target_modules_bd_b": LINEAR}}),
        Merged({"use_bdlora": {"target_modules_bd_a": ["q_proj"],
                               "target_modules_bd_b": ["v_proj"]}}),
    ],
    "arrow_config": [Refused({"top_k": 2}, "token by token")],
    "kasa_config": [Merged({"kasa_config": "KasaConfig"})],
    "ensure_weight_tying": [
        Merged({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, base)
        for base in ("tied", "twice")
    ],
}  # fmt: skip
CASES = [(name, row) for name, rows in OPTIONS.items() for row in rows if isinstance(row, Merged)]
REFUSALS = [(n, row) for n, rows in OPTIONS.items() for row in rows if isinstance(row, Refused)]


def test_the_table_has_every_option_of_the_installed_peft() -> None:
    from peft import LoraConfig

    assert {field.name for field in fields(LoraConfig)} == COMMON | OPTIONS.keys()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    found = {
        "plain": llama(folder / "plain"),
        "biased": llama(folder / "biased", attention_bias=True),
        "tied": llama(folder / "tied", tie_word_embeddings=True),
        "twice": llama(folder / "twice", tie_word_embeddings=True),
    }
    rewrite(found["twice"], lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]})
    return found


def made(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with PEFT's own objects where a test names them."""
    return {
        key: settings_of(value) if isinstance(value, str) and value.endswith("Config")
        else block_diagonal(**value) if key == "use_bdlora" else value
        for key, value in settings.items()
    }  # fmt: skip


@pytest.mark.parametrize(("name", "row"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
def test_an_option_is_merged_as_peft_merges_it(
    bases: dict[str, Path], tmp_path: Path, capsys: Any, name: str, row: Merged
) -> None:
    base = bases[row.base]
    right = adapted(base, tmp_path / "a", made(row.settings))
    status, said = command(capsys, "merge", base, tmp_path / "a", "-o", tmp_path / "out")
    assert status == 0 and "warning" not in said, said
    ours, before = tensors(tmp_path / "out"), tensors(base)
    assert worst(before, {name: right[name] for name in before}) > 1e-4
    assert worst(ours, {name: right[name] for name in ours}) < 1e-6


@pytest.mark.parametrize(("name", "row"), REFUSALS, ids=[name for name, _ in REFUSALS])
def test_an_option_that_cannot_be_merged_is_refused(
    bases: dict[str, Path], tmp_path: Path, capsys: Any, name: str, row: Refused
) -> None:
    adapted(bases["plain"], tmp_path / "a", {})
    change(tmp_path / "a", **{name: row.value})
    status, said = command(capsys, "merge", bases["plain"], tmp_path / "a", "-o", tmp_path / "out")
    assert status == 1 and row.words in said and said.count("\n") == 1


@pytest.mark.parametrize("base", ["tied", "twice"])
def test_embeddings_that_parted_from_their_head_are_refused(
    bases: dict[str, Path], tmp_path: Path, capsys: Any, base: str
) -> None:
    """PEFT unties the model that it merges: as one tensor it would not be what was trained."""
    adapted(bases[base], tmp_path / "a", {"modules_to_save": ["embed_tokens"]})
    words = ("merge", bases[base], tmp_path / "a", "-o", tmp_path / "out")
    status, said = command(capsys, *words)
    assert status == 1 and "trained apart from the head" in said and said.count("\n") == 1
    pattern = said[said.index("--exclude") :].split()[1].strip("'")
    assert command(capsys, *words, "--exclude", pattern)[0] == 0


@pytest.mark.parametrize("base", ["tied", "twice"])
def test_lora_on_tied_embeddings_is_what_the_trained_model_computes(
    bases: dict[str, Path], tmp_path: Path, capsys: Any, base: str
) -> None:
    """PEFT adds the delta of a tied pair twice when it merges, once when it computes."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    adapted(bases[base], tmp_path / "a", settings)
    words = ("merge", bases[base], tmp_path / "a", "-o", tmp_path / "out")
    assert command(capsys, *words, "--json")[0] == 0
    plain = AutoModelForCausalLM.from_pretrained(bases[base])
    trained = PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert float((trained(ids).logits - ours(ids).logits).abs().max()) < 1e-5


def test_lora_on_embeddings_without_their_head_is_warned_of(
    bases: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    right = adapted(bases["tied"], tmp_path / "a", {"target_modules": ["q_proj", "embed_tokens"]})
    words = ("merge", bases["tied"], tmp_path / "a", "-o", tmp_path / "out")
    status, said = command(capsys, *words, "--json")
    assert status == 0 and "it changes both" in json.loads(said)["warnings"][0]
    ours = tensors(tmp_path / "out")
    assert worst(ours, {name: right[name] for name in ours}) < 1e-6
