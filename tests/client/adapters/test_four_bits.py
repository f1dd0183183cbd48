"""A base of four bits: refused with a true word wherever it cannot be."""

import importlib.util

import numpy as np
import pytest

from client import check
from client.adapters import cuda_codes
from client.adapters.four_bits import check_four_bits, check_loaded
from client.config import configure
from client.training import build_task
from dare_agg.errors import ConfigError


def settings(**words):
    return configure(weights="nf4", train="lora", **words)


def test_it_is_refused_without_cuda_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(cuda_codes, "seen_by_driver", lambda kind: 0)
    for call in (check_four_bits, build_task):
        with pytest.raises(ConfigError, match="a CUDA device, and there is none here"):
            call(settings(model="nobody/nothing"))
    with pytest.raises(ConfigError, match="and device is 'cpu'; weights = \"bfloat16\""):
        check_four_bits(settings(device="cpu"))
    with pytest.raises(ConfigError, match="there is none here"):
        check.check({"weights": "nf4", "train": "lora"})


def test_it_is_refused_without_the_package_and_on_what_trains_more_than_adapters(monkeypatch):
    monkeypatch.setattr(cuda_codes, "seen_by_driver", lambda kind: 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        check_four_bits(settings())
    with pytest.raises(ConfigError, match='"nf4" with train = "full"'):
        configure(weights="nf4")
    check_four_bits(configure(weights="bfloat16"))


def test_the_remedy_of_four_bits_without_adapters_is_one_that_works_here(monkeypatch):
    words = {"model": "smollm2", "task": "causal-lm", "data": "friends"}
    for gpus, lacking in ((0, "there is none here"), (1, "pip install bitsandbytes")):
        monkeypatch.setattr(cuda_codes, "seen_by_driver", lambda kind, gpus=gpus: gpus)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=f'{lacking}.*weights = "bfloat16" holds') as said:
            configure(**words, weights="nf4")
        assert "set train" not in str(said.value)  # that would be refused, too
        check_four_bits(configure(**words, weights="bfloat16"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match=r"of four bits; set train = lora$"):
        configure(**words, weights="nf4")
    check_four_bits(configure(**words, weights="nf4", train="lora"))


def test_a_task_that_loads_otherwise_is_told(tiny_model):
    from transformers import AutoModel

    with pytest.raises(ConfigError, match="is of language models"):
        check_loaded(AutoModel.from_pretrained(tiny_model), settings(model="tiny"))


@pytest.mark.gpu
def test_adapters_learn_on_a_base_of_four_bits(tiny_language_model, review_files):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("bitsandbytes")
    task = build_task(
        settings(
            task="causal-lm",
            model=str(tiny_language_model),
            data=str(review_files["csv"]),
            text_column="review",
            label_column="tone",
            length=12,
            lora_rank=2,
            steps=20,
            learning_rate=1e-2,
        )
    )
    start = task.initial_state()
    trained, _, _ = task.train(start, np.arange(64), seed=[0])
    assert task.evaluate(trained)["loss"] < task.evaluate(start)["loss"]
