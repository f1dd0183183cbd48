import numpy as np
import pytest

from client.config import configure
from client.training import build_task
from dare_agg.errors import ConfigError


def config(tiny_model, review_files, **more):
    settings = {
        "model": str(tiny_model),
        "data": str(review_files["csv"]),
        "text_column": "review",
        "label_column": "tone",
        "length": 12,
        "steps": 20,
        "learning_rate": 1e-3,
        "head_learning_rate": 1e-2,
    }
    return configure(**{**settings, **more})


def test_training_learns_and_repeats_bit_for_bit(tiny_model, review_files):
    task = build_task(config(tiny_model, review_files))
    start = task.initial_state()
    rows = np.arange(len(task.train_rows))
    trained, examples, metrics = task.train(start, rows, seed=[0, 1])
    again, _, _ = build_task(config(tiny_model, review_files)).train(start, rows, seed=[0, 1])
    assert examples == 192 and metrics["train-loss"] > 0
    assert all(np.array_equal(trained[name], again[name]) for name in trained)
    assert task.evaluate(trained)["accuracy"] > task.evaluate(start)["accuracy"] + 0.2
    other, _, _ = task.train(start, rows, seed=[0, 2])
    assert not np.array_equal(other["head.weight"], trained["head.weight"])


def test_lora_state_holds_adapters_and_head_only(tiny_model, review_files):
    task = build_task(config(tiny_model, review_files, train="lora", lora_rank=2))
    start = task.initial_state()
    assert all("lora_" in name or name.startswith("head.") for name in start)
    trained, _, _ = task.train(start, np.arange(64), seed=[0])
    assert any(not np.array_equal(trained[name], start[name]) for name in start if "lora_B" in name)


def test_head_only_leaves_the_encoder_alone(tiny_model, review_files):
    task = build_task(config(tiny_model, review_files, train="head"))
    assert set(task.initial_state()) == {"head.weight", "head.bias"}


def test_a_model_that_cannot_be_had_is_explained(review_files, tiny_model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = build_task(config(tiny_model, review_files, model="nobody/nothing"))
    with pytest.raises(ConfigError, match="'nobody/nothing' cannot be loaded"):
        task.initial_state()


def test_no_rows_is_an_error(tiny_model, review_files):
    task = build_task(config(tiny_model, review_files))
    with pytest.raises(ConfigError, match="no rows"):
        task.train(task.initial_state(), np.arange(0), seed=[0])
