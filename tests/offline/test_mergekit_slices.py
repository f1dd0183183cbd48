"""Slices of mergekit's files: models of others' layers, numbers by slice, adapters under a base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dare_agg.checkpoint import open_checkpoint
from dare_agg.offline.recipe_file import read_recipe
from tests.tiny import command, llama, rewrite, tensors, worst

ROWS = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name, seed in (("a", 0), ("b", 1)):
        llama(place / name, seed, num_hidden_layers=4)
    return place


def merged(folder: Path, out: Path, text: str, capsys: pytest.CaptureFixture[str]) -> Path:
    """Merge a file that lies beside the models, and its explanation: the same bits."""
    file = folder / "slices.yml"
    file.write_text(text)
    status, said = command(capsys, "merge", file, "-o", out)
    assert status == 0, said
    _, recipe = command(capsys, "merge", "--explain", file)
    kept = [line for line in recipe.splitlines() if not line.startswith("note: ")]
    (out.parent / "ours.yaml").write_text("\n".join(kept))
    status, said = command(capsys, "merge", out.parent / "ours.yaml", "-o", out.parent / "again")
    assert status == 0, said
    for shard in out.glob("*.safetensors"):
        assert shard.read_bytes() == (out.parent / "again" / shard.name).read_bytes()
    return out


DEEPER = """\
slices:
  - sources:
      - model: a
        layer_range: [0, 3]
  - sources:
      - model: b
        layer_range: [1, 3]
        parameters:
          scale:
            - {filter: down_proj, value: 0}
            - value: 1
  - sources:
      - model: a
        layer_range: [1, 4]
merge_method: passthrough
"""


def test_a_deeper_model_of_others_layers_is_what_it_says(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    out = merged(folder, tmp_path / "out", DEEPER, capsys)
    a, b, found = tensors(folder / "a"), tensors(folder / "b"), tensors(out)
    order = [(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (a, 1), (a, 2), (a, 3)]
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == len(order)
    for place, (model, layer) in enumerate(order):
        for name in a:
            before, dot, rest = name.partition(f"layers.{layer}.")
            if not dot:
                continue
            right = model[name] * (0 if model is b and "down_proj" in name else 1)
            assert np.array_equal(found[f"{before}layers.{place}.{rest}"], right), (place, name)
    assert len(found) == 3 + 9 * len(order)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert model.config.num_hidden_layers == len(order)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_layer_that_is_taken_twice_is_not_tied(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = DEEPER.replace("model: b", "model: a").replace("[1, 3]", "[2, 3]")
    found = tensors(merged(folder, tmp_path / "out", text, capsys))
    assert found[ROWS.format(2)].any() and not found[ROWS.format(3)].any()


def test_shards_of_several_models_get_names_of_their_own(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in (folder / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    stored = tmp_path / "b" / "model.safetensors"
    stored.rename(tmp_path / "b" / "model-00001-of-00001.safetensors")
    names = open_checkpoint(folder / "b").names
    (tmp_path / "b" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")})
    )
    out = merged(tmp_path, tmp_path / "out", DEEPER, capsys)
    assert sorted(file.name for file in out.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert len(open_checkpoint(out).names) == 3 + 9 * 8


def test_numbers_and_models_by_slice(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """\
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: [1, 3]}}
  - sources:
      - {model: a, layer_range: [2, 4], parameters: {weight: 0.5}}
      - {model: b, layer_range: [1, 3], parameters: {weight: 0.25}}
merge_method: linear
parameters: {normalize: false}
dtype: float16
"""
    found = tensors(merged(folder, tmp_path / "out", text, capsys))
    a, b = tensors(folder / "a"), tensors(folder / "b")
    right = {
        ROWS.format(0): a[ROWS.format(0)],
        ROWS.format(1): 3 * a[ROWS.format(1)],
        ROWS.format(3): 0.5 * a[ROWS.format(3)] + 0.25 * b[ROWS.format(2)],
        "model.embed_tokens.weight": a["model.embed_tokens.weight"],
        "lm_head.weight": 0.5 * a["lm_head.weight"] + 0.25 * b["lm_head.weight"],
    }
    assert worst(found, right) < 2e-4


def test_each_model_of_a_slice_is_called_by_its_own_name(folder: Path) -> None:
    llama(folder / "c", 2, num_hidden_layers=4)
    file = folder / "three.yml"
    line = "      - {{model: {}, layer_range: [0, 2], parameters: {{weight: 1}}}}\n"
    sources = "".join(line.format(name) for name in "abc")
    part = "  - sources:\n" + sources
    last = part.replace("[0, 2]", "[2, 4]").replace("model: b", "model: x").replace("c,", "b,")
    file.write_text(
        "slices:\n" + part + last.replace("model: x", "model: c")
        + "base_model: a\nmerge_method: ties\n"
    )  # fmt: skip
    values = read_recipe(file).values
    assert [Path(model["path"]).name for model in values["models"]] == ["b", "c"]
    assert [[Path(p["path"]).name for p in m["pieces"]] for m in values["models"]] == [
        ["b", "c"], ["c", "b"],
    ]  # fmt: skip


def test_a_base_with_an_adapter_is_made_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "a"),
        LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "lora")
    whole = model.merge_and_unload().state_dict()
    text = (
        "models:\n  - model: b\n    parameters: {weight: 0.5}\n  - model: a\n"
        "    parameters: {weight: 0.25}\nbase_model: a+lora\nmerge_method: task_arithmetic\n"
    )
    found = tensors(merged(folder, tmp_path / "out", text, capsys))
    a, b = tensors(folder / "a"), tensors(folder / "b")
    right = {}
    for name in a:
        base = whole[name].numpy()
        right[name] = base + 0.5 * (b[name] - base) + 0.25 * (a[name] - base)
    assert worst(found, right) < 1e-6


def test_layer_types_follow_their_layers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        llama(tmp_path / name, num_hidden_layers=4)
        file = tmp_path / name / "config.json"
        config = json.loads(file.read_text())
        kinds = ["full_attention", "sliding_attention"] * 2
        file.write_text(json.dumps({**config, "layer_types": kinds}))
    out = merged(tmp_path, tmp_path / "out", DEEPER, capsys)
    kinds = json.loads((out / "config.json").read_text())["layer_types"]
    # Layers 0 1 2, 1 2, 1 2 3.
    assert [kind[0] for kind in kinds] == list("fsfsfsfs")


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (("[1, 3]", "[1, 5]"), "b has 4 layers, [1, 5] are asked for"),
        (("filter: down_proj", "filter: layers.1."), "line 10: filter 'layers.1.' of scale is a l"),
        (("[1, 3]", "[3, 1]"), "line 7: layer_range [3, 1] is not [first, stop]"),
        (("layer_range: [1, 3]", "{}"), "layer_range is missing"),
        (("      - model: b\n", "      - {model: a, layer_range: [0, 3]}\n      - model: b\n"),
         "line 5: passthrough takes 1 model, 2 are given"),
        (("merge_method: passthrough", "merge_method: ties\nbase_model: b"),
         "line 2: base_model b is not among the sources of this slice"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    right: str,
) -> None:
    file = folder / "wrong.yml"
    file.write_text(DEEPER.replace(*change).replace("        {}\n", ""))
    status, text = command(capsys, "merge", file, "-o", tmp_path / "out")
    assert status == 1 and right in text, text


def test_pieces_of_models_with_other_names_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(tmp_path / "a", num_hidden_layers=4)
    llama(tmp_path / "b", num_hidden_layers=4)
    rewrite(
        tmp_path / "b",
        lambda t: {
            name.replace("model.layers", "model.blocks"): value for name, value in t.items()
        },
    )
    file = tmp_path / "r.yml"
    file.write_text(DEEPER)
    status, text = command(capsys, "merge", file, "-o", tmp_path / "out")
    assert status == 1 and "pieces are of models of one architecture" in text, text
