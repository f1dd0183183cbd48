import csv

import numpy as np
import pytest

from client.config import configure
from client.models import model_path
from client.training import build_task
from client.unpack import file_digest, unpack
from dare_agg.errors import ConfigError


def config(model, data, **more):
    settings = {
        "task": "causal-lm",
        "model": str(model),
        "data": str(data),
        "text_column": "review",
        "label_column": "tone",
        "length": 16,
        "steps": 20,
        "batch": 8,
        "learning_rate": 3e-3,
    }
    return configure(**{**settings, **more})


def test_training_learns_and_repeats_bit_for_bit(tiny_language_model, review_files):
    task = build_task(config(tiny_language_model, review_files["csv"]))
    start = task.initial_state()
    assert "model.embed_tokens.weight" in start and "lm_head.weight" not in start  # tied
    rows = np.arange(len(task.train_rows))
    trained, examples, metrics = task.train(start, rows, seed=[0, 1])
    again, _, _ = build_task(task.config).train(start, rows, seed=[0, 1])
    assert examples == len(rows) and metrics["train-loss"] > 0
    assert all(np.array_equal(trained[name], again[name]) for name in trained)
    before, after = task.evaluate(start), task.evaluate(trained)
    assert after["loss"] < before["loss"] - 0.3 and 0 < after["accuracy"] < 1
    assert after["perplexity"] == pytest.approx(np.exp(after["loss"]))


def test_loss_is_the_models_own_and_padding_does_not_count(tiny_language_model, review_files):
    import torch
    from transformers import AutoModelForCausalLM

    task = build_task(config(tiny_language_model, review_files["csv"]))
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    loss, count = 0.0, 0
    for block in task.test_rows.inputs:
        ids = torch.from_numpy(block.astype(np.int64))[None]
        loss += float(model(input_ids=ids, labels=ids).loss.detach()) * (block.size - 1)
        count += block.size - 1
    assert any(block.size < task.config.length for block in task.test_rows.inputs)
    assert task.evaluate(task.initial_state())["loss"] == pytest.approx(loss / count, rel=1e-5)


def test_blocks_keep_all_text_and_never_mix_groups(tiny_language_model, tmp_path):
    path = tmp_path / "speakers.csv"
    words = {"Ann": "good", "Bob": "bad"}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["line", "speaker"])
        for i in range(60):
            name = ("Ann", "Bob")[i % 2]
            writer.writerow([" ".join([words[name]] * (1 + i % 5)), name])
    task = build_task(
        config(tiny_language_model, path, text_column="line", partition_by="speaker", length=8)
    )
    rows = [*zip(task.data.train.inputs, task.data.train.groups, strict=True)]
    rows += zip(task.data.test.inputs, task.data.test.groups, strict=True)
    end, ids = 1, {"Ann": 2, "Bob": 6}
    for block, speaker in rows:
        assert set(block.tolist()) <= {end, ids[speaker]}
    kept = sum(int((block != end).sum()) for block, _ in rows)
    written = sum(1 + i % 5 for i in range(60))
    assert written - 4 <= kept <= written  # at most one token a speaker and split is left over
    assert set(task.train_rows.labels.tolist()) == {0} and task.data.label_names == ("",)


def test_a_plain_text_file_is_cut_into_paragraphs(tiny_language_model, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("good film\nfine book\n\n" * 30, encoding="utf-8")
    task = build_task(config(tiny_language_model, path))
    assert len(task.train_rows) and len(task.test_rows)
    assert task.evaluate(task.initial_state())["loss"] > 0
    with pytest.raises(ConfigError, match="has no column 'tone'"):
        build_task(config(tiny_language_model, path, task="text-classification"))


def test_lora_state_holds_the_architectures_usual_adapters(tiny_language_model, review_files):
    task = build_task(config(tiny_language_model, review_files["csv"], train="lora", lora_rank=2))
    start = task.initial_state()
    assert all(".q_proj.lora_" in name or ".v_proj.lora_" in name for name in start)
    trained, _, _ = task.train(start, np.arange(16), seed=[0])
    assert any(not np.array_equal(trained[name], start[name]) for name in start if "lora_B" in name)


def test_gram_matrices_leave_padding_out_and_fisher_values_are_refused(
    tiny_language_model, review_files
):
    import torch

    task = build_task(config(tiny_language_model, review_files["csv"]))
    start, rows = task.initial_state(), np.arange(len(task.train_rows))
    blocks = task.train_rows.inputs
    assert any(block.size < task.config.length for block in blocks)
    found = task.statistics("gram", start, rows, examples=len(rows))
    table = torch.from_numpy(start["model.embed_tokens.weight"])[np.concatenate(blocks)]
    norm = start["model.layers.0.input_layernorm.weight"]
    x = torch.nn.functional.rms_norm(table, norm.shape, torch.from_numpy(norm), 1e-6).numpy()
    expected = x.T @ x / len(x)
    assert np.allclose(found["model.layers.0.self_attn.q_proj.weight"], expected, atol=1e-5)
    with pytest.raises(ConfigError, match="a pass for every word"):
        task.statistics("fisher", start, rows, examples=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "head"}, "no head of its own"),
        ({"model": "minilm"}, "no causal language model; built in: smollm2"),
        ({"model": "nobody/nothing"}, "'nobody/nothing' cannot be loaded"),
        ({"length": 1}, "leaves no room"),
    ],
)
def test_what_cannot_be_is_explained(
    tiny_language_model, review_files, monkeypatch, changes, message
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = {"model": tiny_language_model, **changes}.pop("model")
    changes = {key: value for key, value in changes.items() if key != "model"}
    with pytest.raises(ConfigError, match=message):
        build_task(config(model, review_files["csv"], **changes)).initial_state()


def test_archives_in_parts_are_joined_checked_and_unpacked_once(
    tiny_language_model, tmp_path, monkeypatch
):
    import zipfile

    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    whole = tmp_path / "model.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        for path in tiny_language_model.iterdir():
            archive.write(path, f"inner/{path.name}")
        archive.writestr("inner/../escaped.json", "{}")
        archive.writestr("inner/run.py", "raise SystemExit")
    blob = whole.read_bytes()
    parts = [tmp_path / "a.zip.001", tmp_path / "a.zip.002"]
    parts[0].write_bytes(blob[:1000])
    parts[1].write_bytes(blob[1000:])
    with pytest.raises(ConfigError, match="not 00000000…; get it again"):
        unpack("tiny", parts, "00000000", ".zip", "get it again")
    folder = unpack("tiny", parts, file_digest(whole), ".zip", "")
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in tiny_language_model.iterdir()}
    assert not list((tmp_path / "cache").rglob("*escaped*"))
    for part in parts:
        part.unlink()
    assert unpack("tiny", parts, file_digest(whole), ".zip", "") == folder


@pytest.mark.slow
def test_the_built_in_language_model_reads_its_gguf_file():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = model_path("smollm2")
    except ConfigError as error:
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
