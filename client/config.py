"""What a node trains: the configuration of a task, read from run config and node config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ConfigValue = bool | int | float | str | bytes


@dataclass(frozen=True)
class TaskConfig:
    """What to train, on what and how.

    Attributes
    ----------
    task: a row of `client.tasks.KINDS`, or "auto" to tell it from ``data`` and ``model``.
    model: a row of `client.models.MODELS`, a Hugging Face name, a folder or a GGUF file.
    data: see `client.data.load_text` and `client.images.load_images`.
    method: "full" fine-tuning, "lora" adapters, or "head" only.
    lora_targets: names of the modules that get adapters (none: PEFT's choice for the model).
    pooling: "mean" over tokens, or "cls".
    length: tokens a text is cut to; for language models, tokens of a block of joined texts.
    image_size: pixels an image is scaled to, each way (0: the model's own).
    steps: optimizer steps a round; epochs, where above 0, wins over it.
    train_rows, test_rows: use at most so many (0 for all).
    precision: "float32", or "bfloat16" for the matrix products of the forward and backward
        pass (weights, optimizer and deltas stay float32): twice as fast where the processor
        has such instructions.
    """

    task: str = "auto"
    model: str = "minilm"
    data: str = "reuters-r8"
    text_column: str = "text"
    label_column: str = "label"
    partition_column: str = ""
    label_names: tuple[str, ...] = ()
    method: str = "full"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_targets: tuple[str, ...] = ()
    pooling: str = "mean"
    length: int = 32
    image_size: int = 0
    batch: int = 16
    steps: int = 5
    epochs: int = 0
    learning_rate: float = 5e-5
    head_learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warm_up: float = 0.0
    train_rows: int = 0
    test_rows: int = 0
    seed: int = 0
    precision: str = "float32"


# Run-config key → field of `TaskConfig`.
_FIELDS = {
    "task": "task",
    "model": "model",
    "data": "data",
    "text-column": "text_column",
    "label-column": "label_column",
    "partition-by": "partition_column",
    "train": "method",
    "lora-rank": "lora_rank",
    "lora-alpha": "lora_alpha",
    "pooling": "pooling",
    "length": "length",
    "image-size": "image_size",
    "batch": "batch",
    "steps": "steps",
    "epochs": "epochs",
    "learning-rate": "learning_rate",
    "head-learning-rate": "head_learning_rate",
    "weight-decay": "weight_decay",
    "train-rows": "train_rows",
    "test-rows": "test_rows",
    "seed": "seed",
    "precision": "precision",
}
# What a node's own config may set. Each of these may also be a list in the run config: one
# entry for each of several data sources.
_OWN = ("data", "text-column", "label-column", "partition-by")


def task_config(
    run: Mapping[str, ConfigValue],
    node: Mapping[str, ConfigValue],
    *,
    labels: Sequence[str] = (),
    method: str = "",
) -> TaskConfig:
    """Build the task's configuration; what a node's own config says of its data wins.

    ``labels`` are the names agreed for the run; ``method`` overrides what is trained. Where
    the run config names several data sources, simulated clients take them in turn.
    """
    given: dict[str, object] = {field: run[key] for key, field in _FIELDS.items() if key in run}
    sources = data_sources(str(run.get("data", "")))
    if len(sources) > 1:
        place = int(node.get("partition-id", 0)) % len(sources)
        for key in _OWN:
            words = sources if key == "data" else split_list(str(run.get(key, "")))
            if len(words) == len(sources):
                given[_FIELDS[key]] = words[place]
    for key in _OWN:
        if key in node:
            given[_FIELDS[key]] = node[key]
    if "data-path" in node:
        given["data"] = node["data-path"]
    if run.get("lora-targets"):
        given["lora_targets"] = split_list(str(run["lora-targets"]))
    if method:
        given["method"] = method
    own = split_list(str(node.get("labels", "")))
    names = tuple(labels) or own or split_list(str(run.get("labels", "")))
    return TaskConfig(**given, label_names=names)  # type: ignore[arg-type]


def place(run: Mapping[str, ConfigValue], node: Mapping[str, ConfigValue]) -> tuple[int, int]:
    """Return (number, count): which part of its data source a node trains on.

    (0, 1), the whole, for a node with its own data or outside a simulation.
    """
    if "data-path" in node or "data" in node or "partition-id" not in node:
        return 0, 1
    number, nodes = int(node["partition-id"]), int(node["num-partitions"])
    sources = len(data_sources(str(run.get("data", ""))))
    return number // sources, len(range(number % sources, nodes, sources))


def data_sources(data: str) -> tuple[str, ...]:
    """Split ``data`` where it lists several sources; a path that exists is one."""
    if Path(data).exists():
        return (data,)
    return split_list(data) or (data,)


def split_list(text: str) -> tuple[str, ...]:
    """Split a comma-separated run-config value; run config holds scalars only."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
