"""A model's tensors in three groups, and the global model as flat vectors.

- **delta**: what DARE sparsifies, one `Layout`;
- **dense**: small shared pieces (a common head, batch-norm statistics) that travel with
  every value, one layout of their own;
- **local**: what never leaves a client (task heads) and what is no parameter at all
  (integer buffers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import LayoutError
from dare_agg.vectors.layout import FloatVector, Layout, fingerprint, layout_of
from dare_agg.vectors.patterns import compile_patterns, matches

Arrays = Mapping[str, NDArray[np.generic]]

# Statistics, not weights: noise may push a variance below zero, so they travel whole.
STATISTICS = (r"(^|\.)running_(mean|var)$",)


@dataclass(frozen=True)
class Groups:
    """Which tensor belongs where: two layouts and the local names, in model order."""

    layout: Layout
    dense_layout: Layout
    local: tuple[str, ...]
    names: tuple[str, ...]
    dtypes: Mapping[str, np.dtype]


def split_tensors(
    arrays: Arrays, *, dense: Iterable[str] = (), exclude: Iterable[str] = ()
) -> Groups:
    """Sort a model's tensors into groups by name and dtype.

    ``dense`` and ``exclude`` are regular expressions searched in each name; ``exclude``
    wins. Tensors that are not floating point are local; running statistics are dense.
    Raises `LayoutError` when nothing is left for the delta group.
    """
    exclude_patterns = compile_patterns(exclude)
    dense_patterns = compile_patterns([*dense, *STATISTICS])
    delta_shapes: dict[str, tuple[int, ...]] = {}
    dense_shapes: dict[str, tuple[int, ...]] = {}
    local: list[str] = []
    for name, array in arrays.items():
        if array.dtype.kind != "f" or matches(name, exclude_patterns):
            local.append(name)
        elif matches(name, dense_patterns):
            dense_shapes[name] = array.shape
        else:
            delta_shapes[name] = array.shape
    layout = layout_of(delta_shapes)
    if layout.size == 0:
        raise LayoutError(
            f"none of {len(arrays)} tensors is left for the delta group; narrow 'exclude' "
            f"{list(exclude)} or 'dense' {list(dense)}"
        )
    return Groups(
        layout,
        layout_of(dense_shapes),
        tuple(local),
        tuple(arrays),
        {name: array.dtype for name, array in arrays.items()},
    )


@dataclass(frozen=True)
class GlobalModel:
    """A state of the global model: the groups' vectors and the local tensors' first values."""

    groups: Groups
    delta: FloatVector
    dense: FloatVector
    local: Arrays

    @cached_property
    def ref(self) -> ModelRef:
        """Fingerprints and sizes, as a round plan names them."""
        layout, dense_layout = self.groups.layout, self.groups.dense_layout
        if not dense_layout.size:
            return ModelRef(fingerprint(layout, self.delta), layout.fingerprint, layout.size)
        return ModelRef(
            fingerprint(layout, self.delta),
            layout.fingerprint,
            layout.size,
            fingerprint(dense_layout, self.dense),
            dense_layout.fingerprint,
            dense_layout.size,
        )

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the model's tensors by name, in their order and dtypes.

        float32 tensors are views of the vectors: copy before changing them.
        """
        named = dict(self.local)
        named.update(self.groups.layout.unflatten(self.delta, self.groups.dtypes))
        named.update(self.groups.dense_layout.unflatten(self.dense, self.groups.dtypes))
        return {name: named[name] for name in self.groups.names}

    def moved(self, step: FloatVector, dense_step: FloatVector | None) -> GlobalModel:
        """Return the model after ``step`` (and ``dense_step``), added in float32.

        Where tensors are float16 the sum is rounded to what they hold, since that is what
        clients get and fingerprint.
        """
        dense = self.dense if dense_step is None else self.dense + dense_step
        moved = GlobalModel(self.groups, self.delta + step, dense, self.local)
        if not any(dtype == np.float16 for dtype in self.groups.dtypes.values()):
            return moved
        arrays = moved.arrays()
        return moved.placed(
            self.groups.layout.flatten(arrays), self.groups.dense_layout.flatten(arrays)
        )

    def placed(self, delta: FloatVector, dense: FloatVector) -> GlobalModel:
        """Return the model with these vectors instead.

        Raises `LayoutError` for other sizes.
        """
        if delta.shape != self.delta.shape or dense.shape != self.dense.shape:
            raise LayoutError(
                f"vectors of {delta.size} and {dense.size} parameters; this model has "
                f"{self.delta.size} and {self.dense.size}"
            )
        return replace(self, delta=delta, dense=dense)


def global_model(
    arrays: Arrays, *, dense: Iterable[str] = (), exclude: Iterable[str] = ()
) -> GlobalModel:
    """Make the global model from named arrays (a copy).

    >>> model = global_model({"w": np.ones((2, 2), np.float32), "head": np.ones(2, np.float32)},
    ...                      exclude=["head"])
    >>> model.groups.layout.names, model.groups.local
    (('w',), ('head',))
    """
    groups = split_tensors(arrays, dense=dense, exclude=exclude)
    return GlobalModel(
        groups,
        groups.layout.flatten(arrays),
        groups.dense_layout.flatten(arrays),
        {name: np.array(arrays[name]) for name in groups.local},
    )


@dataclass(frozen=True)
class ModelRef:
    """Which state of the global model a plan is about: fingerprints and sizes.

    ``base`` and ``layout`` belong to the delta group, ``dense_*`` to the dense group
    (empty strings and 0 where there is none).
    """

    base: str
    layout: str
    size: int
    dense_base: str = ""
    dense_layout: str = ""
    dense_size: int = 0

    @property
    def version(self) -> str:
        """One name (hex) for the state of both groups."""
        if not self.dense_size:
            return self.base
        return hashlib.sha256(f"{self.base} {self.dense_base}".encode()).hexdigest()
