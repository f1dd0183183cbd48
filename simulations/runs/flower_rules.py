"""Flower's own robust strategies, its own code, on whole float32 models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.runs.quiet import quiet_flower

Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class FlowerRule:
    """How a strategy is made for n clients of whom f are Byzantine, and the n it asks for."""

    make: Callable[[int, int], Any]
    least: Callable[[int], int]


def _krum(n: int, f: int) -> Any:
    from flwr.serverapp.strategy import Krum

    return Krum(num_malicious_nodes=f)


def _multi_krum(n: int, f: int) -> Any:
    from flwr.serverapp.strategy import MultiKrum

    return MultiKrum(num_malicious_nodes=f, num_nodes_to_select=n - f)


def _bulyan(n: int, f: int) -> Any:
    from flwr.serverapp.strategy import Bulyan

    return Bulyan(num_malicious_nodes=f)


def _trimmed(n: int, f: int) -> Any:
    from flwr.serverapp.strategy import FedTrimmedAvg

    return FedTrimmedAvg(beta=f / n)


def _median(n: int, f: int) -> Any:
    from flwr.serverapp.strategy import FedMedian

    return FedMedian()


FLOWER_RULES: Mapping[str, FlowerRule] = {
    "flower:Krum": FlowerRule(_krum, lambda f: 2 * f + 3),
    "flower:MultiKrum": FlowerRule(_multi_krum, lambda f: 2 * f + 3),
    "flower:Bulyan": FlowerRule(_bulyan, lambda f: 4 * f + 3),
    "flower:FedTrimmedAvg": FlowerRule(_trimmed, lambda f: 2 * f + 1),
    "flower:FedMedian": FlowerRule(_median, lambda f: 2 * f + 1),
}


@quiet_flower()
def flower_merge(
    name: str, models: Sequence[Arrays], weights: Sequence[float], f: int
) -> dict[str, NDArray[np.float32]]:
    """What a strategy makes of trained models: its ``aggregate_train`` on real messages."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

    from simulations.runs.memory_grid import pretend_task

    pretend_task()
    messages = []
    for model, weight in zip(models, weights, strict=True):
        record = ArrayRecord({key: Array(np.ascontiguousarray(a)) for key, a in model.items()})
        metrics = MetricRecord({"num-examples": int(weight)})
        content = RecordDict({"arrays": record, "metrics": metrics})
        messages.append(Message(content, dst_node_id=1, message_type="train"))
    strategy = FLOWER_RULES[name].make(len(models), f)
    merged, _ = strategy.aggregate_train(1, messages)
    return {key: array.numpy().astype(np.float32) for key, array in merged.items()}
