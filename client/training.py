"""How a task learns: the loop that all tasks share, free of Flower.

The state is a dict of named float32 arrays, which federated code ships and merges.
Training starts from a state and a seed and gives the same bits every time on one machine:
at the usual settings on one thread of the CPU, without dropout, batches drawn from the seed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.adapters.base import frozen_fingerprint
from client.adapters.components import own_components
from client.adapters.four_bits import check_four_bits
from client.batches import draw_batches
from client.bfloat16 import shrink_weights
from client.config import TaskConfig
from client.devices import Compute, compute_of
from client.kept_optimizer import KeptOptimizer
from client.learning import Lesson, Reading, learn
from client.modes import evaluating, prepare, seeded
from client.privately import PrivateSteps, check_private, learn_privately
from client.rows import Data, Indices, Rows
from client.schedule import ONLY_ROUND, Progress
from client.stopping import EarlyStop, rows_aside
from client.tasks.table import find_task
from client.tasks.task import Batch, Metrics, Reader, Task, told_labels
from client.weights import State, on_host, place_state, returned_state, state_parameters
from dare_agg.deploy.devices import check_device
from dare_agg.errors import ConfigError

LOG = logging.getLogger("flwr")


def build_task(config: TaskConfig, data: Data | None = None) -> FineTuning:
    """Build a task; ``data`` overrides what the configuration names."""
    check_device(config.device)
    check_four_bits(config)
    kind = find_task(config)
    kind.check((config.train,))
    data = data or kind.load(config)
    for note in data.notes:
        LOG.warning("%s", note)
    return FineTuning(config, data, kind)


@dataclass
class FineTuning:
    """A pretrained model that learns a task from rows."""

    config: TaskConfig
    data: Data
    kind: Task
    _model: Any = field(default=None, init=False, repr=False)
    _readers: dict[str, Reader] = field(default_factory=dict, init=False, repr=False)
    _initial: State = field(default_factory=dict, init=False, repr=False)
    _said: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            limit = getattr(self.config, f"{name}_rows")
            rows: Rows = getattr(self.data, name)
            if limit and limit < len(rows):
                rows = rows.take(np.arange(limit))
            setattr(self, f"_{name}", rows)

    @property
    def train_rows(self) -> Rows:
        return self._train  # type: ignore[attr-defined]

    @property
    def test_rows(self) -> Rows:
        return self._test  # type: ignore[attr-defined]

    # --- model -----------------------------------------------------------------------------

    @cached_property
    def compute(self) -> Compute:
        """Where this trains; raises `ConfigError` for a device that is missing."""
        return compute_of(self.config)

    def _load(self) -> Any:
        self.compute.begin()
        if self._model is None:
            model = self.kind.network(self.config, len(self.data.label_names))
            named = state_parameters(model, self.config)
            self._initial = on_host(named)
            shrink_weights(model, named, self.config)
            self._model = model.to(self.compute.device)
        return self._model

    @cached_property
    def frozen(self) -> str:
        """Names what is not trained, which all nodes must have alike; "" where all is."""
        if self.config.train == "full":
            return ""
        network = self._load()
        return frozen_fingerprint(network, state_parameters(network, self.config))

    def initial_state(self) -> State:
        return {name: array.copy() for name, array in self.initial.items()}

    @property
    def initial(self) -> Mapping[str, NDArray]:
        """The initial state itself, not to be changed."""
        self._load()
        return self._initial

    def _place(self, state: Mapping[str, NDArray]) -> dict[str, Any]:
        named = state_parameters(self._load(), self.config)
        place_state(named, state)
        return named

    def network(self, state: Mapping[str, NDArray], split: str) -> tuple[Any, Reader]:
        """Return the model holding a state, and the reader of a split's inputs."""
        self._place(state)
        model = self._load()
        model.eval()
        return model, lambda at: self._read(split, at).batch

    # --- data ------------------------------------------------------------------------------

    def _read(self, split: str, at: Indices) -> Reading:
        """The model's inputs and the targets (flat) of some rows, on the device."""
        import torch

        rows = self.train_rows if split == "train" else self.test_rows
        batch = self._reader(split)(at)
        targets = self.kind.targets(batch, torch.from_numpy(rows.labels[at])).flatten()
        counted = self.kind.counted(targets)
        return Reading(self.compute.move(batch), targets.to(self.compute.device), counted)

    def _reader(self, split: str) -> Reader:
        if split not in self._readers:
            rows = self.train_rows if split == "train" else self.test_rows
            self._readers[split] = self.kind.reader(self.config, rows)
        return self._readers[split]

    def readable(self, split: str, rows: Indices) -> Indices:
        """Those of some rows whose inputs can be read; says the first other in the log."""
        check = getattr(self._reader(split), "readable", None)
        if check is None:
            return rows
        good, why = check(rows)
        if why and why not in self._said:
            self._said.add(why)
            LOG.warning("%d of %d rows are left out: %s", len(rows) - len(good), len(rows), why)
        return good

    def _scores(self, batch: Batch) -> Any:
        """The model's scores (flat targets, outputs), in float32."""
        scores = self.kind.scores(self._load(), batch)
        return scores.float().flatten(0, -2)

    def _loss(self, read: Reading) -> Any:
        """The mean loss of what was read, to be differentiated."""
        # Entered anew each time: autocast keeps its copies of the weights while it lasts.
        with self.compute.autocast():
            scores = self._scores(read.batch)
        return self.kind.loss(scores, read.targets)

    # --- learning --------------------------------------------------------------------------

    def train(
        self,
        state: Mapping[str, NDArray],
        rows: Indices,
        *,
        seed: Sequence[int],
        progress: Progress = ONLY_ROUND,
        moments: KeptOptimizer | None = None,
        privately: PrivateSteps | None = None,
    ) -> tuple[State, int, Metrics]:
        """Train on these rows; return (state, rows seen for weighting, measurements).

        ``progress`` says which round of how many this is, for schedules over a whole run;
        ``moments`` where the optimizer's lie between rounds; ``privately`` how each step hides
        single rows, of which nothing is measured then.
        """
        if not len(rows):
            raise ConfigError("a client has no rows to train on; use fewer clients or more data")
        if privately is not None:
            return self._train_privately(state, rows, seed, progress, moments, privately)
        rows, stop_rows = rows_aside(rows, self.config, self.readable)
        drawn = draw_batches(rows, self.config, seed)
        seen = np.unique(np.concatenate(drawn))
        good = self.readable("train", seen)
        if not len(good):
            raise ConfigError(f"none of the {len(seen)} rows drawn for this round can be read")
        batches = [kept for at in drawn if len(kept := at[np.isin(at, good)])]
        # Of rows that were not drawn, nothing is known.
        examples = len(rows) - (len(seen) - len(good))
        with self._lesson(state, seed, progress, moments, seed) as (lesson, named):
            if len(stop_rows):
                lesson = replace(lesson, stop=self._early_stop(lesson.named, stop_rows))
            losses = learn(lesson, batches)
        measured = {"train-loss": float(np.mean(losses))}
        if lesson.stop:
            measured |= {
                "early-stop-loss": lesson.stop.best_loss,
                "early-stop-step": lesson.stop.best_step,
            }
        return returned_state(named, state), examples, measured

    def _train_privately(
        self,
        state: Mapping[str, NDArray],
        rows: Indices,
        seed: Sequence[int],
        progress: Progress,
        moments: KeptOptimizer | None,
        how: PrivateSteps,
    ) -> tuple[State, int, Metrics]:
        # By a secret: which outputs a row drops would tell how many rows came before it.
        with self._lesson(state, seed, progress, moments, how.secret_seed) as (lesson, named):
            check_private(lesson.network, self.config)
            learn_privately(lesson, rows, how, lambda at: self.readable("train", at))
        return returned_state(named, state), len(rows), {}

    @contextmanager
    def _lesson(
        self,
        state: Mapping[str, NDArray],
        seed: Sequence[int],
        progress: Progress,
        moments: KeptOptimizer | None,
        dropout_seed: Sequence[int],
    ) -> Iterator[tuple[Lesson, dict[str, Any]]]:
        """A lesson from a state on, and all of the state's parameters by name."""
        named = self._place(state)
        model = self._load()
        prepare(model, self.config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in named)
        with (
            own_components(model, named, self.config) as learned,
            seeded(dropout_seed, self.config, self.compute),
        ):
            yield (
                Lesson(
                    self.config,
                    self.compute,
                    model,
                    learned,
                    read=lambda at: self._read("train", at),
                    loss=self._loss,
                    progress=progress,
                    moments=moments,
                    seed=seed,
                ),
                named,
            )
        # Gradients are one more model: they go before copies are made.
        model.zero_grad(set_to_none=True)
        self.compute.release()

    def _early_stop(self, named: Mapping[str, Any], rows: Indices) -> EarlyStop:
        def measure() -> float:
            with evaluating(self._load()):
                return self._means([self._summed("train", rows)])["loss"]

        return EarlyStop(named, measure, self.config.early_stop, self.config.early_stop_every)

    def statistics(
        self, kind: str, state: Mapping[str, NDArray], rows: Indices, *, examples: int
    ) -> State:
        """Return Fisher values ("fisher") or Gram matrices ("gram") of a state, by name.

        They are those of the first ``examples`` of these training rows, which are partitioned
        at random. Tensors the state does not train have none.
        """
        from dare_agg.merge.collect import collect_fisher, collect_grams

        self.kind.check((kind,))
        self.compute.check_sums()
        named = self._place(state)
        model = self._load()
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in named)
        chosen = self.readable("train", rows[:examples])
        batches = (
            self._read("train", chosen[lo : lo + 16]).batch for lo in range(0, len(chosen), 16)
        )

        def forward(network: Any, batch: Batch) -> Any:
            return self.kind.scores(network, batch).float()

        collect = collect_fisher if kind == "fisher" else collect_grams
        found = collect(model, batches, forward=forward)
        return {name: array for name, array in found.items() if name in named}

    def evaluate(
        self, state: Mapping[str, NDArray], rows: Indices | None = None, *, split: str = "test"
    ) -> Metrics:
        """Return the task's metrics on a split's rows (all, or those given), "loss" among them.

        Where the task tells labels apart, ``metric:label`` of each label too, with its rows.
        """
        import torch

        self._place(state)
        model = self._load()
        model.eval()
        every = self.train_rows if split == "train" else self.test_rows
        chosen = np.arange(len(every)) if rows is None else rows
        if not len(chosen):
            raise ConfigError("no test rows to evaluate on; use fewer clients or more data")
        if not len(readable := self.readable(split, chosen)):
            raise ConfigError(f"none of the {len(chosen)} test rows can be read")
        labels = told_labels(self.data, every, readable) if self.kind.by_label else {}
        parts = labels or {"": readable}
        with torch.inference_mode():
            found = {label: self._summed(split, at) for label, at in parts.items()}
            answered = self.kind.answered(model, self.config, self.data, every, readable)
        metrics = self._means(found.values())
        for label in labels:
            means = self._means([found[label]])
            metrics |= {f"{name}:{label}": value for name, value in means.items()}
            metrics[f"rows:{label}"] = len(parts[label])
        return {**metrics, **answered}

    def _summed(self, split: str, at: Indices) -> tuple[int, Metrics]:
        """How many targets of some rows count, and each metric's sum over those."""
        size = self.kind.evaluate_rows
        with self.compute.autocast():
            reads = (self._read(split, at[lo : lo + size]) for lo in range(0, len(at), size))
            return _added(self.kind.sums(self._scores(r.batch), r.targets) for r in reads)

    def _means(self, summed: Iterable[tuple[int, Metrics]]) -> Metrics:
        """Each metric over all targets of these sums, and what follows from the means."""
        total, sums = _added(summed)
        means = {name: value / total for name, value in sums.items()}
        return {**means, **self.kind.derived(means)}


def _added(parts: Iterable[tuple[int, Metrics]]) -> tuple[int, Metrics]:
    total, sums = 0, dict[str, float]()
    for count, found in parts:
        total += count
        sums = {name: sums.get(name, 0) + value for name, value in found.items()}
    return total, sums
