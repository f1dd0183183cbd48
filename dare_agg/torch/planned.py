"""What an update of a model would be, before the model has values: on the device meta, say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import UpdateSpec, update_bytes
from dare_agg.torch.named import named_tensors
from dare_agg.vectors.model import Groups, split_tensors

_KEY, _NAME = bytes(16), "00" * 32


@dataclass(frozen=True)
class PlannedUpdate:
    """Groups of a model's tensors, and the bytes of one client's update of each group.

    ``dense_bytes`` are 0 where there is no dense group.
    """

    groups: Groups
    update_bytes: int
    dense_bytes: int

    @property
    def parameters(self) -> int:
        """Parameters of both groups, tied ones once."""
        return self.groups.layout.size + self.groups.dense_layout.size


def plan_update(
    model: nn.Module,
    *,
    drop_rate: float | str = "0.9",
    values: str = "b1",
    dense: Iterable[str] = (),
    dense_values: str = "f16",
    exclude: Iterable[str] = (),
) -> PlannedUpdate:
    """Say what a round would send of a model; nothing of it is read, so it may be on ``meta``.

    The words are the strategy's; the mask is the stratified one. Tied weights are one tensor.
    Raises `ConfigError` for a drop rate or format that there is not, `LayoutError` as
    `split_tensors`.

    >>> plan_update(nn.Linear(1000, 1000, device="meta"), drop_rate="0.99").update_bytes
    1516
    """
    stand_ins = {name: _stand_in(tensor) for name, tensor in _once(named_tensors(model)).items()}
    groups = split_tensors(stand_ins, dense=dense, exclude=exclude, by_form=True, apart=stand_ins)
    sizes = (groups.layout.size, drop_rate, values), (groups.dense_layout.size, 0, dense_values)
    update, whole = (
        update_bytes(
            UpdateSpec(size, parse_drop_rate(rate), "stratified", _KEY, _KEY, 0, form, _NAME, _NAME)
        )
        if size
        else 0
        for size, rate, form in sizes
    )
    return PlannedUpdate(groups, update, whole)


def _once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor under the first of its names."""
    first: dict[int, str] = {}
    for name in sorted(tensors, key=str.encode):
        first.setdefault(id(tensors[name]), name)
    return {name: tensor for name, tensor in tensors.items() if first[id(tensor)] == name}


def _stand_in(tensor: Tensor) -> np.ndarray:
    """An array of the tensor's shape and kind that takes no memory."""
    kind = np.float32 if tensor.is_floating_point() else np.int64
    return np.broadcast_to(np.zeros((), kind), tuple(tensor.shape))
