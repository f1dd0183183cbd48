"""The table of server steps: what becomes of a merged delta Δ, element by element.

A new step is a function and a row here, a test and a line in docs/FLOWER_APP.md.

Reference: Reddi et al. 2021, "Adaptive Federated Optimization"; Hsu et al. 2019 (momentum).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from dare_agg.vectors.layout import FloatVector


@dataclass(frozen=True)
class Row:
    """A step's numbers with their defaults, the vectors it keeps, and its kernel.

    ``apply(delta, step, vectors, count, **numbers)`` works on a tile, in place: it writes
    ``step`` and updates ``vectors``; ``count`` is 1 in the first round. A number called beta…
    lies in [0, 1), any other above 0.
    """

    defaults: Mapping[str, float]
    vectors: tuple[str, ...]
    apply: Callable[..., None]
    about: str


def _plain(
    delta: FloatVector, step: FloatVector, vectors: dict[str, FloatVector], count: int, lr: float
) -> None:
    np.multiply(delta, np.float32(lr), out=step)


def _momentum(
    delta: FloatVector,
    step: FloatVector,
    vectors: dict[str, FloatVector],
    count: int,
    lr: float,
    beta: float,
) -> None:
    velocity = vectors["velocity"]
    velocity *= np.float32(beta)
    velocity += delta
    np.multiply(velocity, np.float32(lr), out=step)


def _adam(
    delta: FloatVector,
    step: FloatVector,
    vectors: dict[str, FloatVector],
    count: int,
    lr: float,
    beta1: float,
    beta2: float,
    tau: float,
) -> None:
    first, second = vectors["first"], vectors["second"]
    first *= np.float32(beta1)
    first += np.float32(1 - beta1) * delta
    second *= np.float32(beta2)
    second += np.float32(1 - beta2) * (delta * delta)
    # Products, not libm's pow: the correction must be the same number everywhere.
    corrected1 = 1.0 - _power(beta1, count)
    corrected2 = 1.0 - _power(beta2, count)
    rate = np.float32(lr * math.sqrt(corrected2) / corrected1)
    np.divide(first * rate, np.sqrt(second) + np.float32(tau), out=step)


def _flower_adam(
    delta: FloatVector,
    step: FloatVector,
    vectors: dict[str, FloatVector],
    count: int,
    **numbers: float,
) -> None:
    _adam(delta, step, vectors, count + 1, **numbers)


def _adagrad(
    delta: FloatVector,
    step: FloatVector,
    vectors: dict[str, FloatVector],
    count: int,
    lr: float,
    tau: float,
) -> None:
    squares = vectors["squares"]
    squares += delta * delta
    np.divide(np.float32(lr) * delta, np.sqrt(squares) + np.float32(tau), out=step)


def _yogi(
    delta: FloatVector,
    step: FloatVector,
    vectors: dict[str, FloatVector],
    count: int,
    lr: float,
    beta1: float,
    beta2: float,
    tau: float,
) -> None:
    first, second = vectors["first"], vectors["second"]
    first *= np.float32(beta1)
    first += np.float32(1 - beta1) * delta
    squares = delta * delta
    second -= np.float32(1 - beta2) * squares * np.sign(second - squares)
    np.divide(np.float32(lr) * first, np.sqrt(second) + np.float32(tau), out=step)


def _power(base: float, exponent: int) -> float:
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


SERVER_STEPS: Mapping[str, Row] = MappingProxyType(
    {
        "plain": Row({"lr": 1.0}, (), _plain, "step = lr·Δ (FedAvg at lr 1)"),
        "momentum": Row(
            {"lr": 1.0, "beta": 0.9},
            ("velocity",),
            _momentum,
            "v = beta·v + Δ; step = lr·v (FedAvgM)",
        ),
        "adam": Row(
            {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 0.001},
            ("first", "second"),
            _adam,
            "m, v moments of Δ; step = lr·m̂/(√v + tau) (FedAdam with bias correction)",
        ),
        "flower-adam": Row(
            {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 0.001},
            ("first", "second"),
            _flower_adam,
            "adam as Flower's FedAdam: corrected as if a round later",
        ),
        "adagrad": Row(
            {"lr": 0.1, "tau": 0.001},
            ("squares",),
            _adagrad,
            "v = v + Δ²; step = lr·Δ/(√v + tau) (Flower's FedAdagrad)",
        ),
        "yogi": Row(
            {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 0.001},
            ("first", "second"),
            _yogi,
            "m moment of Δ, v = v − (1−beta2)·Δ²·sign(v−Δ²); step = lr·m/(√v + tau) "
            "(Flower's FedYogi)",
        ),
    }
)
