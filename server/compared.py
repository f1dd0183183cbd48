"""The methods that a run can compare: what each sets otherwise than the run config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Compared:
    """A method that runs can compare: what differs from the run config.

    ``words`` are the strategy's, ``train`` what is trained ("" as configured).
    """

    words: Mapping[str, Any]
    train: str = ""

    @property
    def merge(self) -> str:
        """The merge method."""
        return str(self.words["method"])


_WHOLE = {"drop_rate": "0", "values": "f32", "keep_rates": "uniform"}
METHODS: Mapping[str, Compared] = {
    "fedavg": Compared({"method": "task-arithmetic", **_WHOLE, "dense_values": "f32"}),
    "dare-task-arithmetic": Compared({"method": "task-arithmetic"}),
    "dare-ties": Compared({"method": "ties"}),
    "dare-average": Compared({"method": "average"}),
    "dare-fisher": Compared({"method": "fisher"}),
    "dare-regmean": Compared({"method": "regmean"}),
    "dare-wudi": Compared({"method": "wudi"}),
    "head-only": Compared({"method": "task-arithmetic", **_WHOLE}, train="head"),
}
