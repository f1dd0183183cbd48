"""Server steps against Flower's own strategies, on the same deltas."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedYogi
from flwr.serverapp.strategy.fedopt import FedOpt

from dare_agg.rounds.step import StepState, server_step

SIZE, ROUNDS = 70_001, 6


def both(strategy: FedOpt, ours: str) -> tuple[np.ndarray, np.ndarray]:
    """Six rounds of Flower's aggregation and of our step; the models after them, side by side."""
    generator = np.random.default_rng(7)
    flowers = generator.normal(size=SIZE).astype(np.float32)
    model, state, step_of = flowers.copy(), StepState(), server_step(ours)
    for number in range(1, ROUNDS + 1):
        change = generator.normal(scale=0.01, size=SIZE).astype(np.float32)
        mean = ArrayRecord({"w": Array(flowers + change)})
        strategy.current_arrays = {"w": flowers}
        with patch.object(FedAvg, "aggregate_train", return_value=(mean, None)):
            merged, _ = strategy.aggregate_train(number, [])
        # What Flower sees: the difference of two float32 models.
        state, step = step_of.apply(state, (flowers + change) - flowers)
        flowers = merged["w"].numpy().astype(np.float32)
        model = model + step
    return flowers, model


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ({}, "flower-adam"),
        (
            {"eta": 0.03, "beta_1": 0.5, "beta_2": 0.8, "tau": 1e-4},
            "flower-adam(lr=0.03, beta1=0.5, beta2=0.8, tau=1e-4)",
        ),
    ],
)
def test_flower_adam_is_flowers_fed_adam(words, ours):
    flowers, model = both(FedAdam(**words), ours)
    np.testing.assert_allclose(model, flowers, rtol=1e-6, atol=2e-6)


def test_adam_corrects_as_the_paper_does_and_flower_a_round_ahead():
    delta = np.full(3, 0.25, np.float32)
    _, ours = server_step("adam(lr=1, tau=1e-9)").apply(StepState(), delta)
    _, flowers = server_step("flower-adam(lr=1, tau=1e-9)").apply(StepState(), delta)
    # Bias-corrected, the first step is lr·sign(Δ); Flower's exponents are 2 in round 1.
    np.testing.assert_allclose(ours, 1.0, rtol=1e-6)
    np.testing.assert_allclose(flowers, np.sqrt(1 - 0.99**2) / (1 - 0.9**2), rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "ours"), [({}, "adagrad"), ({"eta": 0.03, "tau": 1e-4}, "adagrad(lr=0.03, tau=1e-4)")]
)
def test_adagrad_is_flowers(words, ours):
    flowers, model = both(FedAdagrad(**words), ours)
    assert np.array_equal(model, flowers)


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ({}, "yogi"),
        ({"eta": 0.03, "beta_1": 0.5, "beta_2": 0.8}, "yogi(lr=0.03, beta1=0.5, beta2=0.8)"),
    ],
)
def test_yogi_is_flowers(words, ours):
    flowers, model = both(FedYogi(**words), ours)
    assert np.array_equal(model, flowers)
