"""A classifier of clothes small enough for a thousand clients, in numpy: data, training, accuracy.

Fashion-MNIST's pictures are halved to 14×14; the network is 196-32-10 with ReLU, or with more
hidden units. A base is tuned on a few public pictures, the rest is dealt to clients by a Dirichlet
mixture of labels.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError

FOLDER = Path("/usr/share/datasets/fashion-mnist")
SIDE, HIDDEN, CLASSES = 14, 32, 10
PUBLIC_ROWS = 300
Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Rows:
    """Pictures as rows of numbers, and their labels."""

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return self.labels.size

    def take(self, places: NDArray[np.int64]) -> Rows:
        """Some of the rows."""
        return Rows(self.inputs[places], self.labels[places])


def rows_of(part: str) -> Rows:
    """All rows of ``"train"`` or ``"t10k"``; raises `ConfigError` where the data is not here."""
    return _rows(part, half=True)


def pictures_of(part: str) -> Rows:
    """As `rows_of`, the pictures at their own size of 28×28."""
    return _rows(part, half=False)


@lru_cache(maxsize=2)
def _rows(part: str, half: bool) -> Rows:
    if not FOLDER.is_dir():
        raise ConfigError(f"{FOLDER} is not there; apt-get install dataset-fashion-mnist")
    with gzip.open(FOLDER / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(FOLDER / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    if half:
        values = pixels.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4), dtype=np.float32)
    else:
        values = pixels.astype(np.float32)
    inputs = (values.reshape(len(labels), -1) / 255 - 0.286) / 0.33
    return Rows(inputs.astype(np.float32), labels)


def new_arrays(seed: int, hidden: int = HIDDEN) -> Arrays:
    """An untrained network."""
    draw = np.random.default_rng([seed, 1])
    inputs = SIDE * SIDE
    first = draw.normal(0, np.sqrt(2 / inputs), (inputs, hidden))
    last = draw.normal(0, np.sqrt(1 / hidden), (hidden, CLASSES))
    return {
        "first.weight": first.astype(np.float32),
        "first.bias": np.zeros(hidden, np.float32),
        "last.weight": last.astype(np.float32),
        "last.bias": np.zeros(CLASSES, np.float32),
    }


def train(arrays: Arrays, rows: Rows, steps: int, batch: int, rate: float, seed: object) -> Arrays:
    """The arrays after ``steps`` steps of SGD."""
    return train_each(arrays, [rows], steps, batch, rate, [seed])[0]


def train_each(
    arrays: Arrays,
    dealt: Sequence[Rows],
    steps: int,
    batch: int,
    rate: float,
    seeds: Sequence[object],
) -> list[Arrays]:
    """What each of several clients makes of the same arrays, all of them in one go."""
    count = len(dealt)
    tuned = {n: np.repeat(array[None], count, 0) for n, array in arrays.items()}
    draws = [np.random.default_rng(seed) for seed in seeds]  # type: ignore[arg-type]
    each = np.arange(batch)
    for _ in range(steps):
        places = [
            draw.integers(0, len(rows), batch) for draw, rows in zip(draws, dealt, strict=True)
        ]
        inputs = np.stack([rows.inputs[p] for rows, p in zip(dealt, places, strict=True)])
        labels = np.stack([rows.labels[p] for rows, p in zip(dealt, places, strict=True)])
        hidden = inputs @ tuned["first.weight"] + tuned["first.bias"][:, None]
        active = np.maximum(hidden, 0)
        wrong = softmax(active @ tuned["last.weight"] + tuned["last.bias"][:, None])
        wrong[np.arange(count)[:, None], each[None], labels] -= 1
        wrong *= np.float32(rate / batch)
        back = (wrong @ tuned["last.weight"].transpose(0, 2, 1)) * (hidden > 0)
        tuned["last.weight"] -= active.transpose(0, 2, 1) @ wrong
        tuned["last.bias"] -= wrong.sum(1)
        tuned["first.weight"] -= inputs.transpose(0, 2, 1) @ back
        tuned["first.bias"] -= back.sum(1)
    return [{name: stack[i] for name, stack in tuned.items()} for i in range(count)]


def softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities along the last axis."""
    scores = scores - scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    return scores / scores.sum(-1, keepdims=True)


def accuracy(arrays: Arrays, rows: Rows) -> float:
    """Share of the rows whose label is found."""
    active = np.maximum(rows.inputs @ arrays["first.weight"] + arrays["first.bias"], 0)
    found = (active @ arrays["last.weight"] + arrays["last.bias"]).argmax(1)
    return float(np.mean(found == rows.labels))


def base_and_clients(
    seed: int, clients: int, alpha: float, hidden: int = HIDDEN
) -> tuple[Arrays, list[Rows]]:
    """A base tuned on public rows, and what each client has of all others."""
    every = rows_of("train")
    draw = np.random.default_rng([seed, 2])
    order = draw.permutation(len(every))
    public, rest = every.take(order[:PUBLIC_ROWS]), order[PUBLIC_ROWS:]
    base = train(new_arrays(seed, hidden), public, 300, 32, 0.1, [seed, 3])
    shares = draw.dirichlet(np.full(CLASSES, alpha), clients)
    wanted = len(rest) // clients
    pools = [list(rest[every.labels[rest] == label]) for label in range(CLASSES)]
    dealt: list[Rows] = []
    for mixture in shares:
        left = np.array([len(pool) for pool in pools])
        places: list[int] = []
        for label in draw.choice(CLASSES, wanted, p=mixture):
            if not left[label]:
                label = int(left.argmax())
            places.append(int(pools[label].pop()))
            left[label] -= 1
        dealt.append(every.take(np.array(places, np.int64)))
    return base, dealt
