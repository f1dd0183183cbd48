"""A model's tensors in three groups, and the global model as flat vectors.

- **delta**: what DARE sparsifies, one `Layout`;
- **dense**: small shared pieces (a common head, batch-norm statistics, counters) that travel
  with every value, one layout of their own;
- **local**: what never leaves a client (task heads) and what is no parameter at all
  (masks, tables of integers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ApartError, LayoutError
from dare_agg.vectors.forms import (
    INTEGERS_BELOW,
    INTEGERS_IN,
    integer_bounds,
    is_counter,
    is_mask,
    running_statistics,
    whole_tensors,
)
from dare_agg.vectors.layout import FingerprintStream, FloatVector, Layout, layout_of
from dare_agg.vectors.patterns import compile_patterns, matches
from dare_agg.vectors.tied import came_apart, sets_of, tied_tensors
from dare_agg.vectors.tiled import AnyVector, TiledVector, tiles

Arrays = Mapping[str, NDArray[np.generic]]

# Of an integer: what rounding may have taken from a whole number.
_SLACK = 1e-3


@dataclass(frozen=True)
class Groups:
    """Which tensor belongs where: two layouts and the local names, in model order.

    ``copies`` are names of tied tensors, and the name in a layout that each is a copy of.
    """

    layout: Layout
    dense_layout: Layout
    local: tuple[str, ...]
    names: tuple[str, ...]
    dtypes: Mapping[str, np.dtype]
    copies: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def integers(self) -> tuple[str, ...]:
        """Names of the dense group's tensors that are integers."""
        return tuple(n for n in self.dense_layout.names if self.dtypes[n].kind in "iu")

    def completed(self, base: Arrays, returned: Arrays) -> dict[str, NDArray[np.generic]]:
        """All tensors after training: those returned, and of ``base`` those that were not.

        Raises as `settled`.
        """
        return {**base, **self.settled(returned)}

    def settled(self, returned: Arrays) -> dict[str, NDArray[np.generic]]:
        """The tensors that training returned, tied ones under the name that stands for them too.

        Raises `ApartError` for copies of a tied tensor that differ.
        """
        tuned = dict(returned)
        for first, names in sets_of(self.copies).items():
            if apart := came_apart(names, returned):
                there = next(name for name in names if name in returned)
                raise ApartError(
                    f"tensors {there!r} and {apart[0]!r} are one in the global model, and training "
                    "moved them apart; name one of them in 'dense' to keep them two",
                    [
                        n
                        for each in sets_of(self.copies).values()
                        for n in came_apart(each, returned)
                    ],
                )
            for name in names:
                if name in returned:
                    tuned[first] = returned[name]
        return tuned

    def relaid(self, vector: FloatVector, before: Groups) -> FloatVector:
        """A vector over another layout of the same tensors, over this one."""
        named = before.layout.unflatten(vector)
        named.update({copy: named[f] for copy, f in before.copies.items() if f in named})
        return self.layout.flatten(named)

    def into_vector(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """A tensor's numbers as they stand in the group's vector: an integer n as n/4096.

        Raises `LayoutError` for integers of 2²⁴ and more.
        """
        return _in_vector(name, array) if self.dtypes[name].kind in "iu" else array

    def from_vector(self, name: str, piece: NDArray[np.generic]) -> NDArray[np.generic]:
        """The tensor that its numbers in the vector are; of integers, what is no whole goes."""
        dtype = self.dtypes[name]
        if dtype.kind in "iu":
            return _whole_numbers(piece, dtype)
        return piece.astype(dtype, copy=False)

    def flatten_dense(self, arrays: Arrays) -> FloatVector:
        """Copy the dense group's tensors into one vector; raises as `Layout.flatten`."""
        counted = {n: self.into_vector(n, arrays[n]) for n in self.integers if n in arrays}
        return self.dense_layout.flatten({**arrays, **counted})

    @cached_property
    def coarse(self) -> bool:
        """Whether tensors hold fewer values than the vectors do: float16 and integers."""
        return bool(self.integers) or np.dtype(np.float16) in self.dtypes.values()


def split_tensors(
    arrays: Arrays,
    *,
    dense: Iterable[str] = (),
    exclude: Iterable[str] = (),
    by_form: bool = False,
    apart: Iterable[str] = (),
) -> Groups:
    """Sort a model's tensors into groups by name, kind and form.

    ``dense`` and ``exclude`` are regular expressions searched in each name; ``exclude``
    wins. Tensors that are not floating point are local, torch's running statistics are dense.
    With ``by_form`` so are statistics and counters of all kinds (`dare_agg.vectors.forms`), and
    integers that ``dense`` names, masks are local, and tied tensors but those of ``apart`` are
    one; without, groups are those of runs that began before there was it.
    Raises `LayoutError` when nothing is left for the delta group.
    """
    exclude_patterns = compile_patterns(exclude)
    dense_patterns = compile_patterns(dense)
    shared = {name: a for name, a in arrays.items() if not matches(name, exclude_patterns)}
    floats = {name for name, array in shared.items() if array.dtype.kind == "f"}
    named = {name for name in shared if matches(name, dense_patterns)}
    whole = whole_tensors(shared) if by_form else running_statistics(floats)
    if by_form and not floats - named - whole:
        # A model of vectors alone: they are its weights.
        whole = set()
    masks = {n for n in floats - named if by_form and is_mask(arrays[n])}
    delta_shapes: dict[str, tuple[int, ...]] = {}
    dense_shapes: dict[str, tuple[int, ...]] = {}
    local: list[str] = []
    for name, array in arrays.items():
        if name in floats - named - whole - masks:
            delta_shapes[name] = array.shape
        elif name in floats - masks or (
            by_form and name in shared and is_counter(array, name in named)
        ):
            dense_shapes[name] = array.shape
        else:
            local.append(name)
    copies: dict[str, str] = {}
    for shapes in (delta_shapes, dense_shapes) if by_form else ():
        may_be_tied = {n: arrays[n] for n in shapes.keys() - set(apart) if n in floats}
        copies |= tied_tensors(may_be_tied)
    for copy in copies:
        delta_shapes.pop(copy, None)
        dense_shapes.pop(copy, None)
    layout = layout_of(delta_shapes)
    if layout.size == 0 and arrays and not any(a.dtype.kind == "f" for a in arrays.values()):
        kinds = sorted({str(array.dtype) for array in arrays.values()})
        raise LayoutError(
            f"all {len(arrays)} tensors are {' and '.join(kinds)}, as the bytes of trees or of a "
            "packed model are; a delta is of floating-point weights: send these, or use Flower's "
            "own strategy"
        )
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
        copies,
    )


@dataclass(frozen=True)
class GlobalModel:
    """A state of the global model: the groups' vectors and the local tensors' first values.

    ``delta`` may lie on disk. ``named`` is what a version is called whose name is not made of its
    values (a chain of steps); None for its fingerprints.
    """

    groups: Groups
    delta: AnyVector
    dense: FloatVector
    local: Arrays
    named: ModelRef | None = None

    @cached_property
    def ref(self) -> ModelRef:
        """Fingerprints and sizes, as a round plan names them."""
        return self.fingerprints if self.named is None else self.named

    @cached_property
    def fingerprints(self) -> ModelRef:
        """As `ref`, made of the values themselves, all of which are read."""
        return self._named(_fingerprint(self.groups.layout, self.delta))

    def known(self, fingerprint: str) -> GlobalModel:
        """The model, named by its fingerprints, where the delta group's is known already."""
        return replace(self, named=self._named(fingerprint))

    def _named(self, base: str) -> ModelRef:
        layout, dense_layout = self.groups.layout, self.groups.dense_layout
        if not dense_layout.size:
            return ModelRef(base, layout.fingerprint, layout.size)
        return ModelRef(
            base,
            layout.fingerprint,
            layout.size,
            _fingerprint(dense_layout, self.dense),
            dense_layout.fingerprint,
            dense_layout.size,
        )

    def arrays(self) -> Arrays:
        """Return the model's tensors by name, in their order and dtypes.

        Tied tensors are one array under each name, float32 tensors are views of the vectors:
        copy before changing them. Of a model on disk each is read when it is looked at.
        """
        if isinstance(self.delta, TiledVector):
            return _ReadArrays(self)
        named = dict(self.local)
        named.update(self.groups.layout.unflatten(self.delta, self.groups.dtypes))
        pieces = self.groups.dense_layout.unflatten(self.dense)
        named.update({n: self.groups.from_vector(n, piece) for n, piece in pieces.items()})
        named.update({copy: named[first] for copy, first in self.groups.copies.items()})
        return {name: named[name] for name in self.groups.names}

    def moved(self, step: FloatVector, dense_step: FloatVector | None) -> GlobalModel:
        """Return the model after ``step`` (and ``dense_step``), added in float32, in memory.

        Where tensors are float16 or integers the sum is rounded to what they hold, since that is
        what clients get and fingerprint.
        """
        dense = self.dense if dense_step is None else self.dense + dense_step
        moved = GlobalModel(self.groups, self.delta[:] + step, dense, self.local)
        if not self.groups.coarse:
            return moved
        arrays = moved.arrays()
        return moved.placed(self.groups.layout.flatten(arrays), self.groups.flatten_dense(arrays))

    def placed(
        self, delta: AnyVector, dense: FloatVector, named: ModelRef | None = None
    ) -> GlobalModel:
        """Return the model with these vectors (and this name) instead.

        Raises `LayoutError` for other sizes.
        """
        if delta.shape != self.delta.shape or dense.shape != self.dense.shape:
            raise LayoutError(
                f"vectors of {delta.size} and {dense.size} parameters; this model has "
                f"{self.delta.size} and {self.dense.size}"
            )
        return replace(self, delta=delta, dense=dense, named=named)


def global_model(
    arrays: Arrays,
    *,
    dense: Iterable[str] = (),
    exclude: Iterable[str] = (),
    by_form: bool = False,
    apart: Iterable[str] = (),
) -> GlobalModel:
    """Make the global model from named arrays (a copy), in the groups of `split_tensors`.

    >>> model = global_model({"w": np.ones((2, 2), np.float32), "head": np.ones(2, np.float32)},
    ...                      exclude=["head"])
    >>> model.groups.layout.names, model.groups.local
    (('w',), ('head',))
    """
    groups = split_tensors(arrays, dense=dense, exclude=exclude, by_form=by_form, apart=apart)
    return GlobalModel(
        groups,
        groups.layout.flatten(arrays),
        groups.flatten_dense(arrays),
        {name: np.array(arrays[name]) for name in groups.local},
    )


@dataclass(frozen=True)
class ModelRef:
    """Which state of the global model a plan is about: fingerprints and sizes.

    ``base`` and ``layout`` belong to the delta group, ``dense_*`` to the dense group
    (empty strings and 0 where there is none). Where versions are named by a chain of steps,
    ``base`` and ``dense_base`` are both that name.
    """

    base: str
    layout: str
    size: int
    dense_base: str = ""
    dense_layout: str = ""
    dense_size: int = 0

    @property
    def version(self) -> str:
        """One name (hex) for the state of both groups; that of a chain names both already."""
        if not self.dense_size or self.dense_base == self.base:
            return self.base
        return hashlib.sha256(f"{self.base} {self.dense_base}".encode()).hexdigest()


class _ReadArrays(Mapping[str, NDArray[np.generic]]):
    """A model's tensors, each read when it is looked at."""

    def __init__(self, model: GlobalModel) -> None:
        self._model = model

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        model, groups = self._model, self._model.groups
        own = groups.copies.get(name, name)
        if own in groups.layout:
            entry, vector = groups.layout[own], model.delta
        elif own in groups.dense_layout:
            entry, vector = groups.dense_layout[own], model.dense
        else:
            return model.local[name]
        piece = np.array(vector[entry.offset : entry.stop]).reshape(entry.shape)
        return groups.from_vector(own, piece)

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.groups.names)

    def __len__(self) -> int:
        return len(self._model.groups.names)


def _fingerprint(layout: Layout, vector: AnyVector) -> str:
    digest = FingerprintStream(layout)
    for _, piece in tiles(vector):
        digest.update(piece)
    return digest.hexdigest()


def _in_vector(name: str, array: NDArray[np.generic]) -> NDArray[np.float64]:
    numbers = np.asarray(array, np.float64)
    if not (np.abs(numbers) < INTEGERS_BELOW).all():
        raise LayoutError(
            f"integer tensor {name!r} holds {np.abs(numbers).max():g}; numbers below "
            f"{INTEGERS_BELOW} can be averaged: name it in 'exclude' to keep each client's own"
        )
    return numbers / INTEGERS_IN


def _whole_numbers(piece: NDArray[np.generic], dtype: np.dtype) -> NDArray[np.generic]:
    """The integers of a mean, cut off after the point as a cast does."""
    numbers = piece.astype(np.float64) * INTEGERS_IN
    whole = np.trunc(numbers + np.copysign(_SLACK, numbers))
    # Of a single number, NumPy makes a scalar that is no array.
    return np.asarray(np.clip(whole, *integer_bounds(dtype)), dtype)
