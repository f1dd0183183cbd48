"""From Flower's run config and node config to what this node trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from client.tasks import TaskConfig

ConfigValue = bool | int | float | str | bytes

# Run-config key → field of `TaskConfig`; values are cast to the field's type.
_FIELDS = {
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


def task_config(
    run: Mapping[str, ConfigValue],
    node: Mapping[str, ConfigValue],
    *,
    labels: Sequence[str] = (),
    method: str = "",
) -> TaskConfig:
    """Build the task's configuration; a node's own ``data-path`` or ``data`` wins.

    ``labels`` are the names agreed for the run; ``method`` overrides what is trained.
    """
    given: dict[str, object] = {field: run[key] for key, field in _FIELDS.items() if key in run}
    for key in ("data-path", "data"):
        if key in node:
            given["data"] = node[key]
            break
    if run.get("lora-targets"):
        given["lora_targets"] = split_list(str(run["lora-targets"]))
    if method:
        given["method"] = method
    names = tuple(labels) or split_list(str(run.get("labels", "")))
    return TaskConfig(**given, label_names=names)  # type: ignore[arg-type]


def split_list(text: str) -> tuple[str, ...]:
    """Split a comma-separated run-config value; run config holds scalars only."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
