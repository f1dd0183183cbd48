"""Exports load with transformers' own classes, and score as training did."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from client.config import configure
from client.rows import Data, Rows
from client.training import build_task
from dare_agg.checkpoint import open_tensors
from dare_agg.offline.merging import merge_offline
from dare_agg.offline.recipe import make_recipe
from dare_agg.offline.yaml_text import parse_yaml
from dare_agg.runs.words import without_paths
from server.export import export_model
from tests.chat import make_model

LABELS = ("bad", "fine", "good")
TEXTS = ("the film", "good good book great", "sad the bad poor awful film book the fine happy", "x")
SIZES = {
    "vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 40,
}  # fmt: skip
MODELS = {
    "bert": ("BertConfig", SIZES),
    "roberta": ("RobertaConfig", {**SIZES, "pad_token_id": 0}),
    "electra": ("ElectraConfig", {**SIZES, "embedding_size": 32}),
    "distilbert": ("DistilBertConfig", {"vocab_size": 16, "dim": 32, "n_layers": 2, "n_heads": 2,
                                        "hidden_dim": 64, "max_position_embeddings": 40}),
    "modernbert": ("ModernBertConfig", {**SIZES, "pad_token_id": 0, "cls_token_id": 1,
                                        "sep_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}),
    "resnet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                "layer_type": "basic"}),
    "vit": ("ViTConfig", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "intermediate_size": 64, "image_size": 16, "patch_size": 8}),
}  # fmt: skip


def make_base(folder: Path, kind: str, tiny_model: Path) -> Path:
    name, words = MODELS[kind]
    torch.manual_seed(1)
    model = transformers.AutoModel.from_config(getattr(transformers, name)(**words))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as training would have left it
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    if kind not in ("resnet", "vit"):
        transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def empty_data() -> Data:
    rows = Rows(TEXTS, np.zeros(len(TEXTS), np.int64), ("",) * len(TEXTS))
    return Data("texts", Rows((), np.empty(0, np.int64), ()), rows, LABELS)


def trained(base: Path, tmp_path: Path, **words: object):
    """Our network with changed weights, its scores, and what was exported of it."""
    config = configure(model=str(base), length=12, labels=LABELS, image_size=16, **words)
    images = (base / "preprocessor_config.json").is_file() or "text" not in config.task
    task = build_task(config, empty_data())
    rng = np.random.default_rng(5)
    state = {
        name: array + rng.normal(0, 0.05, array.shape).astype(np.float32)
        for name, array in task.initial_state().items()
    }
    network, reader = task.network(state, "test")
    if images:
        inputs = {"pixel_values": torch.from_numpy(rng.normal(size=(3, 3, 16, 16))).float()}
    else:
        inputs = reader(np.arange(len(TEXTS)))
    with torch.no_grad():
        scores = network(**inputs).numpy()
    run = {"pooling": config.pooling, "length": 12, "data": "/home/me/rows.csv", "image-size": 16,
           "model": str(base), "train": config.train, "lora-rank": config.lora_rank,
           "lora-alpha": config.lora_alpha}  # fmt: skip
    provenance = {"method": "fedavg", "metrics": {"accuracy": 0.9, "loss": 0.5}, "config": run}
    out = tmp_path / "out"
    export_model(out, state, model=str(base), labels=LABELS, provenance=provenance)
    return out, inputs, scores


def loaded(out: Path, auto: str, **words: object):
    model = getattr(transformers, auto).from_pretrained(out, **words)
    assert model.config.id2label == dict(enumerate(LABELS))
    return model.eval()


def scores_of(model, inputs) -> np.ndarray:
    with torch.no_grad():
        return model(**inputs).logits.numpy()


TEXT, IMAGE = "AutoModelForSequenceClassification", "AutoModelForImageClassification"


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_first_token_classifiers_need_no_code(kind, tiny_model, tmp_path):
    base = make_base(tmp_path / "base", kind, tiny_model)
    out, inputs, scores = trained(base, tmp_path, task="text-classification", pooling="cls")
    model = loaded(out, TEXT)
    assert type(model).__module__.startswith("transformers.models.")
    assert np.abs(scores_of(model, inputs) - scores).max() < 1e-5
    assert not list(out.glob("*.py"))


@pytest.mark.parametrize("train", ["full", "head", "lora"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "modernbert"])
def test_mean_classifiers_bring_one_short_file(kind, train, tiny_model, tmp_path):
    if train == "lora" and kind != "bert":
        pytest.skip("the same for all")
    base = make_base(tmp_path / "base", kind, tiny_model)
    words = {"lora_targets": ("query", "value")} if train == "lora" else {}
    out, inputs, scores = trained(
        base, tmp_path, task="text-classification", pooling="mean", train=train, **words
    )
    model = loaded(out, TEXT, trust_remote_code=True)
    assert np.abs(scores_of(model, inputs) - scores).max() < 1e-5
    # Never a head that nobody trained: without the file it does not load.
    with pytest.raises((RuntimeError, ValueError)):
        transformers.AutoModelForSequenceClassification.from_pretrained(out)
    # The encoder alone loads as ever, with the trained weights.
    encoder = transformers.AutoModel.from_pretrained(out)
    own = model.base_model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in encoder.state_dict().items()
               if "pooler" not in name)  # fmt: skip


@pytest.mark.parametrize(("kind", "words"), [("resnet", {}), ("vit", {"trust_remote_code": True})])
@pytest.mark.parametrize("train", ["full", "head"])
def test_image_classifiers(kind, words, train, tiny_model, tmp_path):
    base = make_base(tmp_path / "base", kind, tiny_model)
    out, inputs, scores = trained(base, tmp_path, task="image-classification", train=train)
    assert np.abs(scores_of(loaded(out, IMAGE, **words), inputs) - scores).max() < 1e-5
    classify = transformers.pipeline("image-classification", model=str(out), **words)
    from PIL import Image

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
    found = classify(picture)
    assert {one["label"] for one in found} == set(LABELS)


def test_the_pipeline_cuts_texts_as_training_did(tiny_model, tmp_path):
    base = make_base(tmp_path / "base", "bert", tiny_model)
    out, _, scores = trained(base, tmp_path, task="text-classification")
    classify = transformers.pipeline(
        "text-classification", model=str(out), trust_remote_code=True, truncation=True, top_k=None
    )
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    for text, row in zip(TEXTS, weights, strict=True):
        found = {one["label"]: one["score"] for one in classify([text])[0]}
        assert max(abs(found[name] - row[i]) for i, name in enumerate(LABELS)) < 1e-5
    long = "good " * 30
    assert classify.tokenizer.model_max_length == 12
    assert classify([long])[0] == classify(["good " * 12])[0]


def snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.S)[1]


def test_the_card_is_the_hubs_and_its_snippet_runs(tiny_model, tmp_path):
    base = make_base(tmp_path / "base", "bert", tiny_model)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    out, _, _ = trained(base, tmp_path, task="text-classification")
    card = (out / "README.md").read_text()
    head = parse_yaml(card[3:].partition("\n---")[0])
    assert head["license"] == "mit" and head["pipeline_tag"] == "text-classification"
    assert head["metrics"] == ["accuracy"] and head["library_name"] == "transformers"
    assert head["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.9}]
    assert str(tmp_path) not in card and "/home" not in card and "rows.csv" in card
    from huggingface_hub import ModelCard

    assert ModelCard(card).data.eval_results[0].metric_value == 0.9
    done = subprocess.run(
        [sys.executable, "-c", snippet(card)], cwd=out, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert any(label in done.stdout for label in LABELS)


def test_a_language_models_card_runs(tmp_path):
    base = make_model(tmp_path / "base")
    state = load_file(base / "model.safetensors")
    facts = {"method": "fedavg", "metrics": {"perplexity": 12.5}, "config": {"data": "a/b"}}
    out = export_model(tmp_path / "out", state, model=str(base), labels=(), provenance=facts)
    card = (out / "README.md").read_text()
    head = parse_yaml(card[3:].partition("\n---")[0])
    assert head["pipeline_tag"] == "text-generation" and head["datasets"] == ["a/b"]
    done = subprocess.run(
        [sys.executable, "-c", snippet(card)], cwd=out, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "generated_text" in done.stdout


def test_heads_that_stay_local_are_no_classifier(tiny_model, tmp_path):
    base = make_base(tmp_path / "base", "bert", tiny_model)
    task = build_task(configure(model=str(base), task="text-classification"), empty_data())
    out = tmp_path / "out"
    export_model(out, task.initial_state(), model=str(base), labels=(), provenance={})
    assert "there is no classifier to load" in (out / "README.md").read_text()
    assert "pooled_head.weight" not in load_file(out / "model.safetensors")


def test_paths_of_this_machine_are_no_words_of_a_card():
    words = {"a": ["/srv/x.csv", "b/c"], "d": "~/m", "e": "one,/two/three", "f": 1, "g": "./h"}
    assert without_paths(words) == {
        "a": ["x.csv", "b/c"], "d": "m", "e": "one,three", "f": 1, "g": "h",
    }  # fmt: skip


@pytest.mark.parametrize("train", ["full", "head"])
def test_the_built_in_image_model(train, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    config = configure(
        model="efficientnet-lite0", labels=LABELS, image_size=32, task="image-classification",
        train=train,
    )  # fmt: skip
    task = build_task(config, empty_data())
    rng = np.random.default_rng(5)
    state = {
        name: array * rng.uniform(0.98, 1.02, array.shape).astype(np.float32)
        for name, array in task.initial_state().items()
    }
    network, _ = task.network(state, "test")
    inputs = {"pixel_values": torch.from_numpy(rng.normal(size=(2, 3, 32, 32))).float()}
    with torch.no_grad():
        scores = network(**inputs).numpy()
    out = tmp_path / "out"
    words = {"image-size": 32, "model": "efficientnet-lite0"}
    export_model(out, state, model="efficientnet-lite0", labels=LABELS,
                 provenance={"config": words})  # fmt: skip
    model = loaded(out, IMAGE, trust_remote_code=True)
    assert np.abs(scores_of(model, inputs) - scores).max() < 1e-5
    with pytest.raises((ValueError, OSError)):
        transformers.AutoModelForImageClassification.from_pretrained(out, trust_remote_code=False)
    read = transformers.AutoImageProcessor.from_pretrained(out)
    assert read.crop_size["height"] == 32 and abs(read.image_std[0] - 128 / 255) < 1e-9


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_to_merge_and_diff_an_export_is_its_body_alone(pooling, tiny_model, tmp_path):
    base = make_base(tmp_path / "base", "bert", tiny_model)
    out, _, _ = trained(base, tmp_path, task="text-classification", pooling=pooling)
    ours, before = open_tensors(out), open_tensors(base)
    assert ours.shapes == before.shapes
    saved = load_file(out / "model.safetensors")
    pooler = "unused.pooler.dense.weight" if pooling == "cls" else "pooler.dense.weight"
    assert np.array_equal(ours.array("pooler.dense.weight"), saved[pooler])
    merged = tmp_path / "merged"
    recipe = make_recipe({"base": base, "models": [out], "method": "task-arithmetic"})
    merge_offline(recipe, merged)
    assert open_tensors(merged).shapes == before.shapes
    for name in before.names:
        np.testing.assert_allclose(open_tensors(merged).array(name), ours.array(name), atol=1e-6)
