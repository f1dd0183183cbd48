"""What a merge method is given, and what it hands back to the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import MergeError
from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.sources import DeltaSource

Span = tuple[int, int]
# A share of survivors above which reading whole tiles is cheaper than listing them.
SPARSE_LIMIT = 0.2
# Sums over tensors are taken in these blocks, so that no tile size changes them.
FIXED_BLOCK = 1 << 16


@dataclass
class Scratch:
    """Buffers of one thread, reused from tile to tile."""

    _buffers: dict[str, NDArray[Any]] = field(default_factory=dict)

    def get(self, name: str, size: int, dtype: Any = np.float32) -> NDArray[Any]:
        """Return an uninitialised vector of ``size``; the name owns its memory."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[name] = np.empty(size, dtype)
        return buffer[:size]


# One model's: arrays by tensor name, or Fisher values over the whole layout.
Statistics = Mapping[str, NDArray[Any]] | DeltaSource

# Writes the merged delta of [lo, hi) into out.
Kernel = Callable[[int, int, FloatVector, Scratch], None]


def is_sparse(source: DeltaSource) -> bool:
    """Whether a source lists its survivors and they are few."""
    # Asked of every source several times; checking the protocol would take ten times as long.
    survivors = getattr(source, "survivors", None)
    return survivors is not None and source.size > 0 and survivors <= SPARSE_LIMIT * source.size


@dataclass(frozen=True)
class MergeTask:
    """Deltas, their weights and a method's settled options.

    ``spans`` cut the vector where weights or scaling change; ``weights`` is
    (models, spans), ``scaling`` (spans,). Options by tensor are arrays over the layout's tensors,
    (models, tensors) or (tensors,): see `numbers` and `shared`. ``statistics`` holds each
    model's Fisher values or Gram matrices. With ``writes_model`` the kernel writes base + delta, as
    exact as the model is small.
    """

    layout: Layout
    sources: tuple[DeltaSource, ...]
    spans: tuple[Span, ...]
    weights: NDArray[np.float64]
    scaling: NDArray[np.float64]
    options: Mapping[str, Any]
    tile: int
    base: DeltaSource | None = None
    statistics: Sequence[Statistics] = ()
    writes_model: bool = False

    @property
    def count(self) -> int:
        """Number of models."""
        return len(self.sources)

    @property
    def tensor_spans(self) -> tuple[Span, ...]:
        """Spans of the tensors that have elements, in layout order."""
        return tuple((e.offset, e.stop) for e in self.layout.entries if e.size)

    def need_base(self, method: str) -> DeltaSource:
        """Return the base, or raise `MergeError`: for methods on whole models."""
        if self.base is None:
            raise MergeError(f"{method} works on whole models; give it the base beside the deltas")
        return self.base

    def per_model(self, option: str) -> list[float]:
        """An option that is one number, or one for each model, as a list.

        Raises `MergeError` for a list of another length.
        """
        value = self.options[option]
        if isinstance(value, np.ndarray):
            raise MergeError(f"{option} differs from tensor to tensor; give one number a model")
        if isinstance(value, list | tuple):
            if len(value) != self.count:
                raise MergeError(
                    f"{option} has {len(value)} values, {self.count} models are merged; give one "
                    "number or one for each model"
                )
            return [float(v) for v in value]
        return [float(value)] * self.count

    def numbers(self, option: str) -> NDArray[np.float64]:
        """A per-model option for every model and tensor, (models, `tensor_spans`)."""
        value = self.options[option]
        if isinstance(value, np.ndarray):
            return value[:, self._filled]
        column = np.array(self.per_model(option), np.float64)[:, None]
        return np.repeat(column, len(self._filled), axis=1)

    def shared(self, option: str) -> NDArray[np.float64]:
        """An option of the whole merge for every tensor, (`tensor_spans`,)."""
        value = self.options[option]
        if isinstance(value, np.ndarray):
            return value[self._filled]
        return np.full(len(self._filled), float(value))

    @property
    def _filled(self) -> list[int]:
        return [i for i, entry in enumerate(self.layout.entries) if entry.size]

    def values_at(self, values: NDArray[np.float64], spans: Sequence[Span]) -> NDArray[np.float64]:
        """Values (last axis: the task's spans) for other, finer spans."""
        starts = [lo for lo, _ in self.spans]
        index = np.searchsorted(starts, [lo for lo, _ in spans], side="right") - 1
        return values[..., index]

    @property
    def is_sparse(self) -> bool:
        """Whether all sources list few survivors."""
        return all(is_sparse(source) for source in self.sources)

    def tiles(self, lo: int = 0, hi: int | None = None) -> Iterator[Span]:
        """Cut ``[lo, hi)`` where tiles of the whole vector are cut."""
        stop = self.layout.size if hi is None else hi
        while lo < stop:
            end = min(stop, (lo // self.tile + 1) * self.tile)
            yield lo, end
            lo = end


def cut(
    spans: Sequence[Span], starts: NDArray[np.int64], lo: int, hi: int
) -> Iterator[tuple[int, int, int]]:
    """Yield ``(span number, a, b)`` for the spans inside ``[lo, hi)``."""
    number = int(np.searchsorted(starts, lo, side="right")) - 1
    while lo < hi:
        end = min(hi, spans[number][1])
        if end > lo:
            yield number, lo, end
            lo = end
        number += 1


def span_starts(spans: Sequence[Span]) -> NDArray[np.int64]:
    """First element of each span: the ``starts`` that `cut` searches."""
    return np.array([lo for lo, _ in spans], np.int64)
