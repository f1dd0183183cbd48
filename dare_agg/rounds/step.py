"""What the server does with a merged delta: take it as it is, or as a gradient.

A step is a pure function: state and merged delta in, state and applied step out. Every
operation is an elementwise float32 one that IEEE 754 rounds correctly, so equal inputs
give equal bits on any machine.

Reference: Reddi et al. 2021, "Adaptive Federated Optimization"; Hsu et al. 2019 (momentum).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError, StateError, did_you_mean
from dare_agg.vectors.layout import FloatVector

_TILE = 1 << 16


@dataclass(frozen=True)
class StepState:
    """Rounds taken so far and the step's vectors (none before the first round)."""

    count: int = 0
    vectors: Mapping[str, FloatVector] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerStep:
    """A named server step with its numbers; make one with `server_step`."""

    name: str
    numbers: Mapping[str, float]
    vectors: tuple[str, ...]
    _apply: Callable[..., None] = field(repr=False, compare=False)

    def apply(self, state: StepState, delta: FloatVector) -> tuple[StepState, FloatVector]:
        """Return the next state and the step to add to the parameters.

        ``delta`` is the merged delta, float32, shape (parameters,); it is not changed.
        Raises `StateError` when the state is not of this step or this model.
        """
        vectors = {name: self._vector(state, name, delta.size) for name in self.vectors}
        step = np.empty(delta.size, np.float32)
        count = state.count + 1
        for lo in range(0, delta.size, _TILE):
            hi = min(lo + _TILE, delta.size)
            tile = {name: vector[lo:hi] for name, vector in vectors.items()}
            self._apply(delta[lo:hi], step[lo:hi], tile, count, **self.numbers)
        return StepState(count, vectors), step

    def _vector(self, state: StepState, name: str, size: int) -> FloatVector:
        if state.count == 0:
            return np.zeros(size, np.float32)
        vector = state.vectors.get(name)
        if vector is None or vector.shape != (size,) or vector.dtype != np.float32:
            found = "none" if vector is None else f"shape {vector.shape}, {vector.dtype}"
            raise StateError(
                f"server step {self.name!r} needs its vector {name!r} of {size} float32, found "
                f"{found}; resume with the server step the run was started with"
            )
        return vector.copy()


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


def _power(base: float, exponent: int) -> float:
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


@dataclass(frozen=True)
class _Row:
    defaults: Mapping[str, float]
    vectors: tuple[str, ...]
    apply: Callable[..., None]
    about: str


SERVER_STEPS: Mapping[str, _Row] = MappingProxyType(
    {
        "plain": _Row({"lr": 1.0}, (), _plain, "step = lr·Δ (FedAvg at lr 1)"),
        "momentum": _Row(
            {"lr": 1.0, "beta": 0.9},
            ("velocity",),
            _momentum,
            "v = beta·v + Δ; step = lr·v (FedAvgM)",
        ),
        "adam": _Row(
            {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 0.001},
            ("first", "second"),
            _adam,
            "m, v moments of Δ; step = lr·m̂/(√v + tau) (FedAdam with bias correction)",
        ),
    }
)


def server_step(name: str = "plain", **numbers: float) -> ServerStep:
    """Make the server step ``name`` ("plain", "momentum" or "adam") with its numbers.

    Raises `ConfigError` for an unknown name or number, or one out of bounds.

    >>> server_step("momentum", beta=0.5).numbers["beta"]
    0.5
    """
    if name not in SERVER_STEPS:
        raise ConfigError(f"server step {name!r} is unknown{did_you_mean(name, SERVER_STEPS)}")
    row = SERVER_STEPS[name]
    for key, value in numbers.items():
        if key not in row.defaults:
            raise ConfigError(
                f"server step {name!r} has no number {key!r}{did_you_mean(key, row.defaults)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"server step {name!r}: {key} = {value!r}; a number is needed")
        upper = 1.0 if key.startswith("beta") else math.inf
        lowest_allowed = value >= 0 if key.startswith("beta") else value > 0
        if not (math.isfinite(value) and lowest_allowed and value < upper):
            bound = "[0, 1)" if key.startswith("beta") else "(0, ∞)"
            raise ConfigError(f"server step {name!r}: {key} = {value!r}; it must lie in {bound}")
    merged = {key: float(numbers.get(key, default)) for key, default in row.defaults.items()}
    return ServerStep(name, MappingProxyType(merged), row.vectors, row.apply)


def state_to_arrays(state: StepState) -> dict[str, NDArray[np.generic]]:
    """Return the state as named arrays, for a safetensors file."""
    arrays: dict[str, NDArray[np.generic]] = {"count": np.asarray([state.count], np.int64)}
    arrays.update({f"vector.{name}": vector for name, vector in state.vectors.items()})
    return arrays


def state_from_arrays(arrays: Mapping[str, NDArray[np.generic]]) -> StepState:
    """Read back what `state_to_arrays` gave; raises `StateError` if it is not that."""
    count = arrays.get("count")
    if count is None or count.shape != (1,) or count.dtype != np.int64 or int(count[0]) < 0:
        raise StateError("server step state has no valid 'count'; resume from an older round")
    vectors: dict[str, FloatVector] = {}
    for name, array in arrays.items():
        if name == "count":
            continue
        if not name.startswith("vector.") or array.dtype != np.float32 or array.ndim != 1:
            raise StateError(
                f"server step state holds {name!r} ({array.dtype}, shape {array.shape}); "
                "only flat float32 vectors belong there: resume from an older round"
            )
        vectors[name.removeprefix("vector.")] = np.asarray(array, np.float32)
    return StepState(int(count[0]), vectors)
