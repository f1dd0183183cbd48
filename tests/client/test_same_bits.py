"""At its usual settings training gives the bits it always gave, on one thread of the CPU."""

import numpy as np
import pytest
from plain_loop import plain_training

from client.config import configure
from client.training import build_task


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text", {"train": "full"}),
        ("text", {"train": "lora", "lora_rank": 2}),
        ("text", {"train": "head"}),
        ("text", {"weight_decay": 0.1, "warm_up": 0.3}),
        ("language", {"batch": 7}),
    ],
    ids=["full", "lora", "head", "decay and warm-up", "language model"],
)
def test_the_bits_are_those_of_the_plain_loop(
    kind, words, precision, tiny_model, tiny_language_model, review_files
):
    models = {"text": ("text-classification", tiny_model), "language": ("causal-lm", None)}
    name, model = models[kind]
    config = configure(
        task=name,
        model=str(model or tiny_language_model),
        data=str(review_files["csv"]),
        text_column="review",
        label_column="tone",
        length=12,
        precision=precision,
        learning_rate=1e-3,
        **{"steps": 6, "batch": 16, **words},
    )
    task = build_task(config)
    start = task.initial_state()
    rows = np.arange(5, 60)
    seed = (3, 2, 1)
    trained, _, measured = task.train(start, rows, seed=seed)
    expected, loss = plain_training(task, start, rows, seed=seed)
    assert set(trained) == set(expected)
    assert any(not np.array_equal(trained[n], start[n]) for n in trained)
    assert all(trained[n].tobytes() == expected[n].tobytes() for n in trained)
    assert measured["train-loss"] == loss
