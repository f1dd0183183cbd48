"""Handwritten digits and a small network of many clients at once, in numpy: a run takes seconds.

1,797 images of 8 × 8 pixels (scikit-learn's copy of UCI's), one hidden layer. All clients' networks
are trained side by side as one stack of matrices; each client's batches are its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError

HIDDEN, CLASSES = 200, 10
TEST_ROWS = 360
# The trigger of a backdoor: these pixels, white; and what is then to be seen.
TRIGGER, TARGET = (0, 1, 8), 0
State = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Digits:
    """Training and test rows: pixels from 0 to 1, and labels."""

    train: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test: NDArray[np.float32]
    test_labels: NDArray[np.int64]


def _table() -> Path:
    """The file of the digits: the package is data to us, and need not be imported."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the digits are in scikit-learn, which is not here; install it as data: pip install "
            "--no-deps -r requirements-data.txt"
        )
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


@lru_cache(maxsize=1)
def load_digits() -> Digits:
    """The digits, divided once for all seeds."""
    table = np.loadtxt(_table(), delimiter=",")
    table = table[np.random.default_rng(0).permutation(len(table))]
    pixels, labels = (table[:, :-1] / 16).astype(np.float32), table[:, -1].astype(np.int64)
    return Digits(pixels[TEST_ROWS:], labels[TEST_ROWS:], pixels[:TEST_ROWS], labels[:TEST_ROWS])


def initial_state(seed: int) -> dict[str, NDArray[np.float32]]:
    """A network as it begins: 15,010 parameters."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 60]))
    pixels = load_digits().train.shape[1]

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return rng.normal(0, np.sqrt(2 / rows), (rows, columns)).astype(np.float32)

    return {
        "hidden.weight": matrix(pixels, HIDDEN),
        "hidden.bias": np.zeros(HIDDEN, np.float32),
        "out.weight": matrix(HIDDEN, CLASSES),
        "out.bias": np.zeros(CLASSES, np.float32),
    }


@dataclass(frozen=True)
class Poison:
    """What a client does to its own rows: flip labels, or stamp the trigger on half of them."""

    flip: bool = False
    stamp: bool = False


def train(
    state: State,
    parts: Sequence[NDArray[np.int64]],
    poisons: Sequence[Poison],
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: Sequence[int],
    kept: State | None = None,
) -> list[dict[str, NDArray[np.float32]]]:
    """Train a copy of the network on each part of the rows, by plain SGD; returns the copies.

    ``kept``, of each copy, has 1 where it learns and 0 elsewhere; without it all of it does.
    """
    digits, count = load_digits(), len(parts)
    stack = {name: np.repeat(array[None], count, axis=0) for name, array in state.items()}
    draws = [
        np.random.default_rng(np.random.SeedSequence([*seed, client])) for client in range(count)
    ]
    rows = np.stack(
        [
            draw.choice(part, (steps, batch), replace=part.size < steps * batch)
            for draw, part in zip(draws, parts, strict=True)
        ]
    )
    for step in range(steps):
        pixels, labels = digits.train[rows[:, step]], digits.train_labels[rows[:, step]]
        for client, poison in enumerate(poisons):
            if poison.flip:
                labels[client] = CLASSES - 1 - labels[client]
            if poison.stamp:
                half = batch // 2
                pixels[client, :half, TRIGGER] = 1
                labels[client, :half] = TARGET
        hidden = np.maximum(pixels @ stack["hidden.weight"] + stack["hidden.bias"][:, None], 0)
        logits = hidden @ stack["out.weight"] + stack["out.bias"][:, None]
        logits -= logits.max(axis=2, keepdims=True)
        error = np.exp(logits)
        error /= error.sum(axis=2, keepdims=True)
        np.put_along_axis(
            error, labels[..., None], np.take_along_axis(error, labels[..., None], 2) - 1, 2
        )
        error *= np.float32(rate / batch)
        back = (error @ stack["out.weight"].swapaxes(1, 2)) * (hidden > 0)
        steps_of = {
            "out.weight": hidden.swapaxes(1, 2) @ error,
            "out.bias": error.sum(axis=1),
            "hidden.weight": pixels.swapaxes(1, 2) @ back,
            "hidden.bias": back.sum(axis=1),
        }
        for name, change in steps_of.items():
            stack[name] -= change if kept is None else change * kept[name]
    return [{name: array[client] for name, array in stack.items()} for client in range(count)]


def loss(state: State) -> float:
    """Mean cross-entropy of all training rows."""
    digits = load_digits()
    logits = _logits(state, digits.train).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    own = np.take_along_axis(logits, digits.train_labels[:, None], axis=1)[:, 0]
    return float((np.log(np.exp(logits).sum(axis=1)) - own).mean())


def accuracy(state: State) -> float:
    """Share of test rows that are seen right."""
    digits = load_digits()
    return float((_seen(state, digits.test) == digits.test_labels).mean())


def backdoor_success(state: State) -> float:
    """Share of test rows of other digits that are seen as the target once they are stamped."""
    digits = load_digits()
    others = digits.test[digits.test_labels != TARGET].copy()
    others[:, TRIGGER] = 1
    return float((_seen(state, others) == TARGET).mean())


def _seen(state: State, pixels: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.argmax(_logits(state, pixels), axis=1)


def _logits(state: State, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    hidden = np.maximum(pixels @ state["hidden.weight"] + state["hidden.bias"], 0)
    return hidden @ state["out.weight"] + state["out.bias"]
