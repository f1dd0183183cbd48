"""One module of an adapter: its tensors, its place in the base, what it contributes there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint import Checkpoint
from dare_agg.errors import CheckpointError
from dare_agg.offline.adapters.folder import AdapterFolder
from dare_agg.offline.adapters.forms import Matrix, Rows, Step
from dare_agg.offline.adapters.names import Pieces

# In which order contributions to one tensor act: the base's own rows are replaced or lessened
# first, then factors are added, then outputs scaled.
REPLACE, ADD, SCALE = range(3)


@dataclass(frozen=True)
class Contribution:
    """What one module does to one tensor of the base, in PEFT's order.

    ``steps`` loads the factors; it is given the base's rows and the steps that act before.
    ``stacked`` where the tensor is a stack of matrices, not a convolution's kernel.
    """

    tensor: str
    order: int
    steps: Callable[[Rows, Sequence[Step]], Sequence[Step]]
    adds: bool = True
    stacked: bool = False


@dataclass(frozen=True)
class Module:
    """A module's tensors (names in the file by part) and where its parameters lie.

    ``name`` is the module's in memory; ``find`` gives a parameter's pieces in the base.
    """

    folder: AdapterFolder
    base: Checkpoint
    name: str
    parts: Mapping[str, str]
    find: Callable[[str], Pieces]
    targets: tuple[str, ...] = ()
    attention: bool = False

    @property
    def config(self) -> Mapping[str, Any]:
        """The adapter's configuration."""
        return self.folder.config

    def shape(self, part: str) -> tuple[int, ...]:
        """The shape of a part; raises `CheckpointError` where it is not there."""
        if part not in self.parts:
            has = next(iter(self.parts))
            raise CheckpointError(
                f"{self.folder.path}: {self.name!r} has {has} but no {part}: save the adapter again"
            )
        info = self.folder.tensors.tensors[self.parts[part]]
        if not info.is_float:
            raise CheckpointError(
                f"{self.folder.path}: {part} of {self.name!r} has dtype {info.dtype}; save the "
                "adapter in float32, bfloat16 or float16"
            )
        return info.shape

    def load(self, part: str) -> NDArray[np.float32]:
        """A part's values."""
        return self.folder.tensors.array(self.parts[part])

    def unfit(self, what: str) -> CheckpointError:
        """The error of a module whose parts do not fit the base."""
        return CheckpointError(
            f"{self.folder.path}: {self.name!r}: {what}; the adapter belongs to another model"
        )

    def place(self, names: Sequence[str]) -> tuple[str, str, tuple[int, ...]]:
        """The one tensor that a parameter is: (parameter, tensor, shape).

        Raises `CheckpointError` where the base has it in other pieces than memory does.
        """
        for name in names:
            if pieces := self.find(name):
                if len(pieces) > 1 or pieces[0].hi is not None:
                    raise CheckpointError(
                        f"{self.folder.path}: the base holds {name!r} in other pieces than the "
                        "adapter was trained on; merge it with peft first"
                    )
                tensor = pieces[0].tensor
                return name, tensor, self.base.tensors[tensor].shape
        raise CheckpointError(f"{self.folder.path}: the base has no {names[0]!r}")


def number(value: Any, what: str, path: object, most: float = 1e30) -> float:
    """A number of a configuration; raises `CheckpointError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < most:
        raise CheckpointError(f"{path}: {what} {value!r:.40} is no number; set it in its config")
    return float(value)


def transposed(module: Module, tensor: str, out: int, into: int) -> bool:
    """Whether a weight is stored (in, out), as transformers' Conv1D keeps it.

    Shapes say so, but of square weights; there, whether the base has other weights of this
    leaf, or of the same parent, that have as many biases as columns, not rows. The flag in
    the configuration is that of the module wrapped last, whatever the others are.
    """
    shape = module.base.tensors[tensor].shape
    if shape not in ((out, into), (into, out)):
        raise module.unfit(f"its delta is of shape {(out, into)}, the base's weight of {shape}")
    return shape == (into, out) and (out != into or _conv1d(module.base, tensor))


def _conv1d(base: Checkpoint, tensor: str) -> bool:
    parent, _, leaf = tensor.removesuffix(".weight").rpartition(".")
    for name, info in base.tensors.items():
        other, _, end = name.removesuffix(".weight").rpartition(".")
        if (end != leaf and other != parent) or len(info.shape) != 2:
            continue
        bias = base.tensors.get(name.removesuffix("weight") + "bias")
        rows, columns = info.shape
        if bias is not None and rows != columns and bias.shape == (columns,):
            return True
    return False


def by_view(matrix: NDArray[np.float32]) -> Matrix:
    """Any kernel as a matrix of its outputs."""
    return np.ascontiguousarray(matrix.reshape(matrix.shape[0], -1))
