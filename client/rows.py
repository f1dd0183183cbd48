"""Rows of a data set: inputs with labels, cut into training and test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.cells import label_of
from dare_agg.errors import ConfigError, did_you_mean

Labels = NDArray[np.int64]
Indices = NDArray[np.int64]

# One row as a source gives it: input (a text, an image), label, group.
RawRow = tuple[Any, str, str]
# Training rows, and test rows where the source has them.
RawSets = tuple[list[RawRow], list[RawRow] | None]
# So many rows of so many labels are not a small example.
_MANY = 50


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
    """A data set for classification. ``label_names[i]`` is the name of label i.

    ``notes`` say what was guessed, left out or looks wrong, a line each.
    """

    name: str
    train: Rows
    test: Rows
    label_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def make_data(
    source: str,
    sets: RawSets,
    *,
    label_names: Sequence[str] = (),
    test_share: float = 0.2,
    seed: int = 0,
    notes: Sequence[str] = (),
    learned: bool = True,
) -> Data:
    """Shuffle rows with ``seed``, set test rows apart and number the labels.

    ``test_share`` of the rows is set apart where the source has no test rows of its own.
    Labels are numbered in the order of ``label_names``, else sorted. Raises `ConfigError`
    where there are too few rows, a label is not among ``label_names``, or labels that are to be
    ``learned`` cannot be, since each row has another.
    """
    train, test = sets
    if not train:
        raise ConfigError(f"data {source!r} has no rows; at least one is needed")
    if len(train) == 1 and test is None and test_share > 0:
        raise ConfigError(
            f"data {source!r} has one row; at least 2 are needed, one to train on and one to test"
        )
    train = _shuffled(train, seed, 1)
    if test is None:
        held = max(1, round(len(train) * test_share)) if test_share > 0 else 0
        train, test = train[held:], train[:held]
    else:
        test = _shuffled(test, seed, 2)
    found = {row[1] for row in [*train, *test]}
    if learned:
        _check_labels(source, found, len(train) + len(test))
    names = tuple(label_names) or tuple(sorted(found))
    number = {name: i for i, name in enumerate(map(_same_label, names))}
    if len(number) < len(names):
        raise ConfigError(f"labels {', '.join(names)} name one label twice; name each once")
    return Data(
        source, _rows(train, number, source), _rows(test, number, source), names, tuple(notes)
    )


def _same_label(name: str) -> str:
    return label_of(name, "labels") or name


def _check_labels(source: str, found: set[str], rows: int) -> None:
    if rows >= _MANY and len(found) == rows:
        raise ConfigError(
            f"data {source!r} has {rows} rows and {len(found)} labels, such as "
            f"{min(found)!r:.60}: no two rows share one, so label-column is another column"
        )


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
