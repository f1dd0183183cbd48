"""Rows of a data set: inputs with labels, cut into training and test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError, did_you_mean

Labels = NDArray[np.int64]
Indices = NDArray[np.int64]

# One row as a source gives it: input (a text, an image), label, group.
RawRow = tuple[Any, str, str]
# Training rows, and test rows where the source has them.
RawSets = tuple[list[RawRow], list[RawRow] | None]


@dataclass(frozen=True)
class Rows:
    """Inputs with their labels, and the values of the partition column ("" without one)."""

    inputs: tuple[Any, ...]
    labels: Labels
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Indices) -> Rows:
        """Return these rows only."""
        return Rows(
            tuple(self.inputs[i] for i in rows),
            self.labels[rows],
            tuple(self.groups[i] for i in rows),
        )


@dataclass(frozen=True)
class Data:
    """A data set for classification. ``label_names[i]`` is the name of label i."""

    name: str
    train: Rows
    test: Rows
    label_names: tuple[str, ...]


def make_data(
    source: str,
    sets: RawSets,
    *,
    label_names: Sequence[str] = (),
    test_share: float = 0.2,
    seed: int = 0,
) -> Data:
    """Shuffle rows with ``seed``, set test rows apart and number the labels.

    ``test_share`` of the rows is set apart where the source has no test rows of its own.
    Labels are numbered in the order of ``label_names``, else sorted. Raises `ConfigError`
    where there are no rows or a label is not among ``label_names``.
    """
    train, test = sets
    if not train:
        raise ConfigError(f"data {source!r} has no rows; at least one is needed")
    train = _shuffled(train, seed, 1)
    if test is None:
        held = max(1, round(len(train) * test_share)) if test_share > 0 else 0
        train, test = train[held:], train[:held]
    else:
        test = _shuffled(test, seed, 2)
    names = tuple(label_names) or tuple(sorted({row[1] for row in [*train, *test]}))
    number = {name: i for i, name in enumerate(names)}
    return Data(source, _rows(train, number, source), _rows(test, number, source), names)


def _shuffled(rows: list[RawRow], seed: int, stream: int) -> list[RawRow]:
    order = np.random.default_rng(np.random.SeedSequence([seed, stream])).permutation(len(rows))
    return [rows[i] for i in order]


def _rows(raw: list[RawRow], number: Mapping[str, int], source: str) -> Rows:
    for _, label, _ in raw:
        if label not in number:
            raise ConfigError(
                f"data {source!r} has label {label!r:.60}, which is not among "
                f"{sorted(number)[:10]}{did_you_mean(label, number)}"
            )
    return Rows(
        tuple(row[0] for row in raw),
        np.array([number[row[1]] for row in raw], np.int64),
        tuple(row[2] for row in raw),
    )
