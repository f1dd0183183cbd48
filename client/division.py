"""How a run's rows fall to simulated clients, told before one starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from client.config import DEFAULTS, ConfigValue, TaskConfig, place, task_config
from client.partition import hold_out, partition
from client.rows import Data, Indices
from client.tasks.table import find_task
from client.text_files import is_small
from client.text_sets import BUILT_IN


@dataclass
class Division:
    """Who gets what: of each client its configuration, and its rows of `Division.data`.

    Raises `ConfigError`, when `parts` is called, as the clients themselves would.
    """

    run: Mapping[str, ConfigValue]
    _data: dict[TaskConfig, Data] = field(default_factory=dict, init=False, repr=False)
    _cut: dict[tuple[TaskConfig, int], Sequence[Indices]] = field(
        default_factory=dict, init=False, repr=False
    )

    def data(self, config: TaskConfig) -> Data:
        """The rows of a configuration, at most ``train-rows`` and ``test-rows`` of them."""
        if config not in self._data:
            data = find_task(config).load(config)
            train, test = data.train, data.test
            if config.train_rows and config.train_rows < len(train):
                train = train.take(np.arange(config.train_rows))
            if config.test_rows and config.test_rows < len(test):
                test = test.take(np.arange(config.test_rows))
            self._data[config] = Data(data.name, train, test, data.label_names, data.notes)
        return self._data[config]

    def parts(self) -> list[tuple[TaskConfig, Indices, Indices]]:
        """Each client's configuration, the rows it trains on and those it holds out."""
        run = {**DEFAULTS, **self.run}
        count = int(str(run["min-clients"]))
        found = []
        for number in range(count):
            node: dict[str, ConfigValue] = {"partition-id": number, "num-partitions": count}
            config = task_config(run, node)
            part, parts = place(run, node)
            rows = self._parts(config, str(run["partition"]), float(str(run["alpha"])), parts)[part]
            found.append((config, *hold_out(rows, config.held_out, (config.seed, part))))
        return found

    def _parts(self, config: TaskConfig, rule: str, alpha: float, count: int) -> Sequence[Indices]:
        if (config, count) not in self._cut:
            rows = self.data(config).train
            self._cut[config, count] = (
                [np.arange(len(rows))]
                if count == 1
                else partition(rule, rows.labels, rows.groups, count, alpha=alpha, seed=config.seed)
            )
        return self._cut[config, count]


def check_division(run: Mapping[str, ConfigValue], configs: Sequence[TaskConfig]) -> None:
    """Refuse, before any client starts, what cannot be divided among so many.

    Only where all sources are classes of text read in a moment: others tell it themselves.
    """
    if all(
        find_task(config).agreed_labels and (config.data in BUILT_IN or is_small(Path(config.data)))
        for config in configs
    ):
        Division(run).parts()
