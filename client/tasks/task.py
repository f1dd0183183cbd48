"""What a task says of itself. Nothing else asks which one it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from client.config import TaskConfig
from client.rows import Data, Indices, Rows
from client.tasks.cross_entropy import class_loss, class_sums
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
    sums: how many of these targets count, and each metric's sum over those, "loss" among them.
    derived: further metrics that follow from the means.
    agreed_labels: whether all clients must number the same labels alike.
    refusals: ways to train ("full", "lora", "head") and statistics ("fisher", "gram") that it
        has none of, and why.
    evaluate_rows: rows that are scored at once.
    """

    name: str
    recognises: Callable[[TaskConfig], bool]
    load: Callable[[TaskConfig], Data]
    network: Callable[[TaskConfig, int], Any]
    reader: Callable[[TaskConfig, Rows], Reader]
    scores: Callable[[Any, Batch], Any] = whole_output
    targets: Callable[[Batch, Any], Any] = row_labels
    loss: Callable[[Any, Any], Any] = class_loss
    sums: Callable[[Any, Any], tuple[int, Metrics]] = class_sums
    derived: Callable[[Metrics], Metrics] = _nothing
    agreed_labels: bool = True
    refusals: Mapping[str, str] = field(default_factory=dict)
    evaluate_rows: int = 100

    def check(self, needs: Iterable[str]) -> None:
        """Raise `ConfigError` for the first of these that the task refuses."""
        for need in needs:
            if need in self.refusals:
                raise ConfigError(self.refusals[need])
