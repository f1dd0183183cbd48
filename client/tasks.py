"""Tasks: a model, its data and how it learns, free of Flower.

A task's state is a dict of named float32 arrays, which federated code ships and merges.
Training starts from a state and a seed and gives the same bits every time on one machine:
one thread, no dropout, batches drawn from the seed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from client.config import TaskConfig
from client.data import load_text
from client.images import is_image_source, load_images
from client.language import (
    IGNORED,
    block_reader,
    language_model,
    load_blocks,
    next_tokens,
    token_scores,
)
from client.models import IMAGES, LANGUAGE, MODELS, TEXT
from client.rows import Data, Indices, Rows
from client.text import text_model, text_reader
from client.vision import image_model, image_reader
from dare_agg.errors import ConfigError, did_you_mean

State = dict[str, NDArray[np.float32]]
Reader = Callable[[Indices], tuple[Any, ...]]

HEAD = r"^head\."


def _class_scores(model: Any, inputs: tuple[Any, ...]) -> Any:
    return model(*inputs)


def _labels(inputs: tuple[Any, ...], labels: Any) -> Any:
    return labels


@dataclass(frozen=True)
class Kind:
    """A row of the table of tasks: how its data, model, inputs and targets are made.

    ``scores`` gives the model's logits (…, classes) for a reader's inputs, ``targets`` the
    classes (…) from inputs and labels; `IGNORED` ones do not count. ``inputs`` names a reader's
    inputs. ``evaluate_rows`` is how many rows are scored at once.
    """

    load: Callable[[TaskConfig], Data]
    model: Callable[[TaskConfig, int], Any]
    reader: Callable[[TaskConfig, Rows], Reader]
    inputs: tuple[str, ...]
    scores: Callable[[Any, tuple[Any, ...]], Any] = _class_scores
    targets: Callable[[tuple[Any, ...], Any], Any] = _labels
    evaluate_rows: int = 100


def _load_text(config: TaskConfig) -> Data:
    return load_text(
        config.data,
        text_column=config.text_column,
        label_column=config.label_column,
        partition_by=config.partition_by,
        label_names=config.labels,
        seed=config.seed,
    )


def _load_images(config: TaskConfig) -> Data:
    return load_images(
        config.data,
        label_column=config.label_column,
        partition_by=config.partition_by,
        label_names=config.labels,
        seed=config.seed,
    )


KINDS: Mapping[str, Kind] = {
    TEXT: Kind(_load_text, text_model, text_reader, ("input_ids", "attention_mask")),
    IMAGES: Kind(_load_images, image_model, image_reader, ("pixel_values",)),
    # Logits over a whole vocabulary are large: few rows at once.
    LANGUAGE: Kind(
        load_blocks, language_model, block_reader, ("input_ids",), token_scores, next_tokens, 8
    ),
}


def task_kind(config: TaskConfig) -> str:
    """The row of `KINDS` that a configuration means; "auto" is told from data and model."""
    if config.task != "auto":
        if config.task not in KINDS:
            raise ConfigError(f"task {config.task!r} is unknown{did_you_mean(config.task, KINDS)}")
        return config.task
    row = MODELS.get(config.model)
    if row is not None and row.task == LANGUAGE:
        return LANGUAGE
    images = is_image_source(config.data) or (row is not None and row.task == IMAGES)
    return IMAGES if images else TEXT


class Task(Protocol):
    """What the client app and the simulations need of a task."""

    config: TaskConfig

    @property
    def train_rows(self) -> Rows: ...

    def initial_state(self) -> State:
        """Return the state every client starts from."""

    def train(
        self, state: Mapping[str, NDArray], rows: Indices, *, seed: Sequence[int]
    ) -> tuple[State, int, dict[str, float]]:
        """Train on these rows; return (state, rows seen for weighting, measurements)."""

    def statistics(
        self, kind: str, state: Mapping[str, NDArray], rows: Indices, *, examples: int
    ) -> State:
        """Return Fisher values ("fisher") or Gram matrices ("gram") of a state, by name."""

    def evaluate(
        self, state: Mapping[str, NDArray], rows: Indices | None = None
    ) -> dict[str, float]:
        """Return loss and accuracy on the test rows (or those given).

        For language models both count tokens, and ``perplexity`` is exp(loss).
        """


def build_task(config: TaskConfig, data: Data | None = None) -> FineTuning:
    """Build a task; ``data`` overrides what the configuration names."""
    if config.train not in ("full", "lora", "head"):
        raise ConfigError(f"train {config.train!r} is unknown; known: full, lora, head")
    if config.precision not in ("float32", "bfloat16"):
        raise ConfigError(f"precision {config.precision!r} is unknown; known: float32, bfloat16")
    if config.pooling not in ("mean", "cls"):
        raise ConfigError(f"pooling {config.pooling!r} is unknown; known: mean, cls")
    kind = KINDS[task_kind(config)]
    return FineTuning(config, data or kind.load(config), kind)


@dataclass
class FineTuning:
    """A pretrained model that learns from rows: labels under a linear head, or next tokens."""

    config: TaskConfig
    data: Data
    kind: Kind
    _model: Any = field(default=None, init=False, repr=False)
    _readers: dict[str, Reader] = field(default_factory=dict, init=False, repr=False)

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

    def _load(self) -> Any:
        if self._model is None:
            self._model = self.kind.model(self.config, len(self.data.label_names))
        return self._model

    def _names(self) -> dict[str, Any]:
        """The tensors of the state: all for full fine-tuning, the trained ones else."""
        named = dict(self._load().named_parameters())
        if self.config.train == "full":
            return named
        if self.config.train == "lora":
            return {n: p for n, p in named.items() if "lora_" in n or n.startswith("head.")}
        return {n: p for n, p in named.items() if n.startswith("head.")}

    def initial_state(self) -> State:
        return {name: array.copy() for name, array in self.initial.items()}

    @property
    def initial(self) -> Mapping[str, NDArray]:
        """The initial state itself, not to be changed."""
        import torch

        torch.set_num_threads(1)
        _keep_freed_memory()
        if not hasattr(self, "_initial"):
            self._initial = {n: p.detach().numpy().copy() for n, p in self._names().items()}
        return self._initial

    def _place(self, state: Mapping[str, NDArray]) -> dict[str, Any]:
        import torch

        _ = self.initial  # kept before anything is placed
        named = self._names()
        with torch.no_grad():
            for name, parameter in named.items():
                if name not in state:
                    raise ConfigError(
                        f"state has no tensor {name!r}; it was made for another model"
                    )
                values = np.asarray(state[name], np.float32)
                if not values.flags.writeable:  # torch warns of those
                    values = values.copy()
                parameter.copy_(torch.from_numpy(values))
        return named

    def network(self, state: Mapping[str, NDArray], split: str) -> tuple[Any, Reader]:
        """Return the model holding a state, and the reader of a split's inputs."""
        self._place(state)
        model = self._load()
        model.eval()
        return model, lambda at: self._batch(split, at)[0]

    def _precision(self) -> Any:
        import torch

        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bfloat16")

    # --- data ------------------------------------------------------------------------------

    def _batch(self, split: str, at: Indices) -> tuple[tuple[Any, ...], Any]:
        """The model's inputs and the targets (flat) of some rows, as tensors."""
        import torch

        rows = self.train_rows if split == "train" else self.test_rows
        if split not in self._readers:
            self._readers[split] = self.kind.reader(self.config, rows)
        inputs = self._readers[split](at)
        return inputs, self.kind.targets(inputs, torch.from_numpy(rows.labels[at])).flatten()

    def _scores(self, inputs: tuple[Any, ...]) -> Any:
        """The model's logits (flat targets, classes), in float32."""
        scores = self.kind.scores(self._load(), inputs)
        return scores.float().flatten(0, -2)

    # --- learning --------------------------------------------------------------------------

    def train(
        self, state: Mapping[str, NDArray], rows: Indices, *, seed: Sequence[int]
    ) -> tuple[State, int, dict[str, float]]:
        import torch

        if not len(rows):
            raise ConfigError("a client has no rows to train on; use fewer clients or more data")
        torch.set_num_threads(1)
        named = self._place(state)
        model = self._load()
        model.eval()  # no dropout: the same seed gives the same bits
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in named)
        batches = draw_batches(rows, self.config, seed)
        head = [p for n, p in named.items() if n.startswith("head.")]
        body = [p for n, p in named.items() if not n.startswith("head.")]
        optimizer = torch.optim.AdamW(
            [
                {"params": body, "lr": self.config.learning_rate},
                {"params": head, "lr": self.config.head_learning_rate},
            ],
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        warm = max(1, round(self.config.warm_up * len(batches)))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / warm)
        )
        losses = []
        for batch in batches:
            inputs, targets = self._batch("train", batch)
            # Entered anew each step: autocast keeps its copies of the weights while it lasts.
            with self._precision():
                scores = self._scores(inputs)
            loss = torch.nn.functional.cross_entropy(scores, targets, ignore_index=IGNORED)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        # Gradients and moments are three more models: they go before copies are made.
        del optimizer, schedule, loss, scores
        model.zero_grad(set_to_none=True)
        trained = {name: p.detach().numpy().copy() for name, p in named.items()}
        return trained, len(rows), {"train-loss": float(np.mean(losses))}

    def statistics(
        self, kind: str, state: Mapping[str, NDArray], rows: Indices, *, examples: int
    ) -> State:
        """Return Fisher values ("fisher") or Gram matrices ("gram") of a state, by name.

        They are those of the first ``examples`` of these training rows, which are partitioned
        at random. Tensors the state does not train have none.
        """
        import torch

        from dare_agg.merge.collect import collect_fisher, collect_grams

        if kind == "fisher" and self.kind is KINDS[LANGUAGE]:
            raise ConfigError(
                "Fisher values of a language model need a pass for every word of the vocabulary; "
                "merge by regmean or by a method that needs no statistics"
            )
        torch.set_num_threads(1)
        named = self._place(state)
        model = self._load()
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in named)
        chosen = rows[:examples]
        batches = (
            dict(zip(self.kind.inputs, self._batch("train", chosen[lo : lo + 16])[0], strict=True))
            for lo in range(0, len(chosen), 16)
        )

        def forward(network: Any, batch: Mapping[str, Any]) -> Any:
            return self.kind.scores(network, tuple(batch.values())).float()

        collect = collect_fisher if kind == "fisher" else collect_grams
        found = collect(model, batches, forward=forward)
        return {name: array for name, array in found.items() if name in named}

    def evaluate(
        self, state: Mapping[str, NDArray], rows: Indices | None = None
    ) -> dict[str, float]:
        import torch

        torch.set_num_threads(1)
        self._place(state)
        model = self._load()
        model.eval()
        chosen = np.arange(len(self.test_rows)) if rows is None else rows
        if not len(chosen):
            raise ConfigError("no test rows to evaluate on; raise the test share")
        right, count, loss, size = 0, 0, 0.0, self.kind.evaluate_rows
        with torch.inference_mode(), self._precision():
            for lo in range(0, len(chosen), size):
                inputs, targets = self._batch("test", chosen[lo : lo + size])
                scores = self._scores(inputs)
                right += int((scores.argmax(dim=1) == targets).sum())
                count += int((targets != IGNORED).sum())
                loss += float(
                    torch.nn.functional.cross_entropy(
                        scores, targets, ignore_index=IGNORED, reduction="sum"
                    )
                )
        measured = {"loss": loss / count, "accuracy": right / count}
        if self.kind is KINDS[LANGUAGE]:
            measured["perplexity"] = float(np.exp(measured["loss"]))
        return measured


def draw_batches(rows: Indices, config: TaskConfig, seed: Sequence[int]) -> list[Indices]:
    """Cut seeded permutations of a client's rows into batches for one round."""
    rng = np.random.default_rng(np.random.SeedSequence([int(s) for s in seed]))
    wanted = config.steps * config.batch if config.epochs == 0 else config.epochs * len(rows)
    order: list[Indices] = []
    while sum(len(part) for part in order) < wanted:
        order.append(rng.permutation(rows))
    drawn = np.concatenate(order)[:wanted] if order else np.empty(0, np.int64)
    return [drawn[lo : lo + config.batch] for lo in range(0, len(drawn), config.batch)]


@cache
def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them after each step.

    Each step frees and takes the gradients of the whole model; without this the kernel
    clears those pages again every time, a fifth of the step. Does nothing elsewhere.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # mmap and trim thresholds
            libc.mallopt(option, value)
    except (OSError, AttributeError):
        pass
