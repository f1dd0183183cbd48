"""What the server does with a merged delta: take it as it is, or as a gradient.

A step is a pure function: state and merged delta in, state and applied step out. Every
operation is an elementwise float32 one that IEEE 754 rounds correctly, so equal inputs
give equal bits on any machine. The steps themselves are the rows of
`dare_agg.rounds.server_steps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError, StateError, did_you_mean
from dare_agg.robust.momentum import Momentum
from dare_agg.rounds.auto_state import NAMES, AutoState, auto_from_arrays
from dare_agg.rounds.called import read_call
from dare_agg.rounds.server_steps import SERVER_STEPS
from dare_agg.vectors.layout import MAX_TENSORS, FloatVector

_TILE = 1 << 16
# Prefixes of a client's momentum and of how many rounds it is made of.
_MOMENTUM, _ROUNDS = "momentum.", "momentum-rounds."


@dataclass(frozen=True)
class StepState:
    """Rounds taken so far and the step's vectors (none before the first round).

    ``levels`` say how much each tensor changed in the last round, where plans are to tell
    (`dare_agg.rounds.levels`); ``auto`` what the next round sends where the rounds choose it
    (`dare_agg.rounds.auto`); ``momenta`` those of the clients by name, where a robust rule keeps
    any (`dare_agg.robust.momentum`).
    """

    count: int = 0
    vectors: Mapping[str, FloatVector] = field(default_factory=dict)
    levels: bytes = b""
    auto: AutoState = AutoState()  # noqa: RUF009 (frozen)
    momenta: Mapping[str, Momentum] = field(default_factory=dict)


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
        self.apply_tile(delta, step, vectors, count)
        return StepState(count, vectors), step

    def apply_tile(
        self,
        delta: FloatVector,
        step: FloatVector,
        vectors: Mapping[str, FloatVector],
        count: int,
    ) -> None:
        """Write the step of a part of the delta, and move its part of the vectors, in place.

        ``count`` is 1 in the first round.
        """
        for lo in range(0, delta.size, _TILE):
            hi = min(lo + _TILE, delta.size)
            tile = {name: vector[lo:hi] for name, vector in vectors.items()}
            self._apply(delta[lo:hi], step[lo:hi], tile, count, **self.numbers)

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


def server_step(step: str = "plain", **numbers: float) -> ServerStep:
    """Make a server step: a row's name, or the name with numbers as text, as in a run config.

    Raises `ConfigError` for an unknown name or number, one out of bounds or given twice.

    >>> server_step("momentum", beta=0.5) == server_step("momentum(beta=0.5)")
    True
    """
    name, written = read_call("server step", step, "adam(beta1=0.9, tau=1e-3)")
    if name not in SERVER_STEPS:
        raise ConfigError(f"server step {name!r} is unknown{did_you_mean(name, SERVER_STEPS)}")
    for key in written:
        if key in numbers:
            raise ConfigError(
                f"server step {step!r}: {key} is given again as {numbers[key]!r}; give it once"
            )
    numbers = {**written, **numbers}
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
    if state.levels:
        arrays["levels"] = np.frombuffer(state.levels, np.uint8)
    for name, momentum in state.momenta.items():
        arrays[f"{_MOMENTUM}{name}"] = momentum.vector
        arrays[f"{_ROUNDS}{name}"] = np.asarray([momentum.rounds], np.int64)
    return arrays | state.auto.to_arrays()


def state_from_arrays(arrays: Mapping[str, NDArray[np.generic]]) -> StepState:
    """Read back what `state_to_arrays` gave; raises `StateError` if it is not that."""
    count = arrays.get("count")
    if count is None or count.shape != (1,) or count.dtype != np.int64 or int(count[0]) < 0:
        raise StateError("server step state has no valid 'count'; resume from an older round")
    vectors: dict[str, FloatVector] = {}
    levels = arrays.get("levels", np.empty(0, np.uint8))
    if levels.dtype != np.uint8 or levels.ndim != 1 or levels.size > MAX_TENSORS:
        raise StateError("server step state has no valid 'levels'; resume from an older round")
    for name, array in arrays.items():
        if name in ("count", "levels", *NAMES) or name.startswith((_MOMENTUM, _ROUNDS)):
            continue
        if not name.startswith("vector.") or array.dtype != np.float32 or array.ndim != 1:
            raise StateError(
                f"server step state holds {name!r} ({array.dtype}, shape {array.shape}); "
                "only flat float32 vectors belong there: resume from an older round"
            )
        vectors[name.removeprefix("vector.")] = np.asarray(array, np.float32)
    return StepState(
        int(count[0]), vectors, levels.tobytes(), auto_from_arrays(arrays), _momenta(arrays)
    )


def _momenta(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, Momentum]:
    found: dict[str, Momentum] = {}
    for key, array in arrays.items():
        if not key.startswith(_MOMENTUM):
            continue
        name = key.removeprefix(_MOMENTUM)
        rounds = arrays.get(_ROUNDS + name)
        told = rounds is not None and rounds.shape == (1,) and rounds.dtype == np.int64
        count = int(rounds[0]) if rounds is not None and told else 0
        if count < 1 or array.dtype != np.float32 or array.ndim != 1:
            raise StateError(
                f"server step state has no valid momentum of client {name!r}; resume from an older "
                "round"
            )
        found[name] = Momentum(np.asarray(array, np.float32), count)
    return found
