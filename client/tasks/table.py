"""The table of tasks."""

from __future__ import annotations

from collections.abc import Mapping

from client.config import TaskConfig
from client.tasks import causal_lm, image_classification, instructions, text_classification
from client.tasks.task import Task
from dare_agg.errors import ConfigError, did_you_mean

# In the order in which "auto" asks them; the last one takes what no other recognises.
TASKS: Mapping[str, Task] = {
    row.name: row
    for row in (
        instructions.TASK,
        causal_lm.TASK,
        image_classification.TASK,
        text_classification.TASK,
    )
}


def find_task(config: TaskConfig) -> Task:
    """The row that a configuration means; raises `ConfigError` for an unknown name."""
    if config.task == "auto":
        return next(row for row in TASKS.values() if row.recognises(config))
    if config.task not in TASKS:
        raise ConfigError(f"task {config.task!r} is unknown{did_you_mean(config.task, TASKS)}")
    return TASKS[config.task]
