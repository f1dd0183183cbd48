"""What a task says of itself. Nothing else asks which one it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from client.config import TaskConfig
from client.rows import Data, Indices, Rows
from client.tasks.cross_entropy import class_loss, class_sums, counted_targets
from dare_agg.errors import ConfigError

# A network's inputs by the names it has for them: tensors, a row of each a row of the data.
Batch = Mapping[str, Any]
Reader = Callable[[Indices], Batch]
Metrics = dict[str, float]


def whole_output(network: Any, batch: Batch) -> Any:
    """Scores of a network that returns nothing else."""
    return network(**batch)


def row_labels(batch: Batch, labels: Any) -> Any:
    """Targets of a task that gives a row one label."""
    return labels


def _nothing(metrics: Metrics) -> Metrics:
    return {}


# Of network, configuration, all rows and which of them.
Answered = Callable[[Any, TaskConfig, Data, Rows, Indices], Metrics]


MOST_LABELS = 32  # of which metrics are told one by one
_UNFIT = re.compile(r"[^\w .,@/+-]")


def told_labels(data: Data, rows: Rows, at: Indices) -> Mapping[str, Indices]:
    """Some rows by the words that metrics tell their labels by; nothing for one label of many."""
    if not 1 <= len(data.label_names) <= MOST_LABELS:
        return {}
    labels = rows.labels[at]
    return {
        _UNFIT.sub("_", data.label_names[label])[:60]: at[labels == label]
        for label in np.unique(labels)
    }


def test_share(config: TaskConfig) -> float:
    """The share of a source's rows that are test rows; none where clients hold out their own.

    Raises `ConfigError` for a file of test rows beside these, which would be passed over.
    """
    if config.held_out and config.test_data:
        raise ConfigError(
            f"held-out = {config.held_out:g} beside test-data = {config.test_data!r}: clients are "
            "evaluated on one of them; leave the other out"
        )
    return 0.0 if config.held_out else 0.2


def _nothing_seen(config: TaskConfig) -> None:
    return None


def _no_answers(network: Any, config: TaskConfig, data: Data, rows: Rows, at: Indices) -> Metrics:
    return {}


@dataclass(frozen=True)
class Task:
    """A row of the table of tasks.

    Attributes
    ----------
    name: the run config's word for it.
    recognises: whether data and model tell that task "auto" means this one.
    load: reads the rows that a configuration names.
    network: makes the pretrained model for a number of labels; its
        own parts under ``head.``, the pretrained ones under ``encoder.``, or under their own names
        where there is no head: so they are exported.
    reader: makes, for rows, the function that gives the batch of some of them. Where rows may
        turn out unreadable it has ``readable(rows)`` too: those that are, and why another is not.
    scores: a network's scores (…, outputs) for a batch.
    targets: what they are held against (…), from the batch and the labels (n,) of its rows.
    loss: mean loss of float32 scores (n, outputs) and flat targets (n,), to be differentiated.
    counted: how many of the flat targets count, which the mean loss is over.
    sums: how many of these targets count, and each metric's sum over those, "loss" among them.
    derived: further metrics that follow from the means.
    agreed_labels: whether all clients must number the same labels alike.
    refusals: ways to train ("full", "lora", "head") and statistics ("fisher", "gram") that it
        has none of, and why.
    evaluate_rows: rows that are scored at once.
    by_label: whether metrics are told label by label too, as ``metric:label``, ``rows:label``
        among them.
    answered: further metrics of a network on some rows that need more than scores, told label
        by label in the same way.
    look: refuses what can be told of data and model in a moment and without torch, as ``load``
        would; asked before anything starts.
    """

    name: str
    recognises: Callable[[TaskConfig], bool]
    load: Callable[[TaskConfig], Data]
    network: Callable[[TaskConfig, int], Any]
    reader: Callable[[TaskConfig, Rows], Reader]
    scores: Callable[[Any, Batch], Any] = whole_output
    targets: Callable[[Batch, Any], Any] = row_labels
    loss: Callable[[Any, Any], Any] = class_loss
    counted: Callable[[Any], int] = counted_targets
    sums: Callable[[Any, Any], tuple[int, Metrics]] = class_sums
    derived: Callable[[Metrics], Metrics] = _nothing
    agreed_labels: bool = True
    refusals: Mapping[str, str] = field(default_factory=dict)
    evaluate_rows: int = 100
    by_label: bool = False
    answered: Answered = _no_answers
    look: Callable[[TaskConfig], object] = _nothing_seen

    def check(self, needs: Iterable[str]) -> None:
        """Raise `ConfigError` for the first of these that the task refuses."""
        for need in needs:
            if need in self.refusals:
                raise ConfigError(self.refusals[need])
