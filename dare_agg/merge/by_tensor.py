"""Merges that work on whole tensors: each is solved once, by whichever thread comes to it first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import MergeError
from dare_agg.merge.task import Kernel, MergeTask, Scratch
from dare_agg.vectors.layout import Entry, FloatVector
from dare_agg.vectors.one_thread import one_blas_thread
from dare_agg.vectors.sources import DeltaSource

Matrix = NDArray[np.floating]
# One tensor's merged delta in its own order, whatever its shape, before λ.
Solve = Callable[[Entry], Matrix]


def by_tensor(task: MergeTask, rest: Kernel, entries: Sequence[Entry], solve: Solve) -> Kernel:
    """λ·``solve`` for ``entries``, ``rest`` for all others.

    A thread that needs a tensor on which another is at work begins the next one meanwhile: so many
    tensors are in memory as there are threads, and the bits are those of one.
    """
    shared = _Solutions(task, entries, solve)
    numbers = {entry.name: number for number, entry in enumerate(entries)}

    def kernel(lo: int, hi: int, out: FloatVector, scratch: Scratch) -> None:
        rest(lo, hi, out, scratch)
        for entry, first, last in task.layout.pieces(lo, hi):
            number = numbers.get(entry.name)
            if number is not None:
                at = entry.offset - lo
                shared.copy(number, first, last, out[at + first : at + last])

    return kernel


class _Solutions:
    """What is solved, until it has been handed out."""

    def __init__(self, task: MergeTask, entries: Sequence[Entry], solve: Solve) -> None:
        self._task, self._entries, self._solve = task, entries, solve
        self._changed = threading.Condition()
        self._found: dict[int, FloatVector] = {}
        self._busy: set[int] = set()
        self._left = [entry.size for entry in entries]
        self._over: set[int] = set()
        self._threads: set[int] = set()

    def copy(self, number: int, first: int, last: int, out: FloatVector) -> None:
        """Write elements of one tensor's solution; after all of them it is forgotten."""
        with self._changed:
            self._threads.add(threading.get_ident())
        while (mine := self._next(number)) is not None:
            self._find(mine)
        with self._changed:
            # Asked for again, before all of it was: it is solved again.
            found = self._found.get(number)
        if found is None:
            found = self._find(number)
        out[:] = found[first:last]
        with self._changed:
            self._left[number] -= last - first
            if self._left[number] <= 0:
                self._left[number] = self._entries[number].size
                self._found.pop(number, None)
                self._over.add(number)

    def _next(self, number: int) -> int | None:
        """What this thread solves now: the tensor it needs, or one ahead; None: it is there."""
        with self._changed:
            while number not in self._found:
                if number not in self._busy:
                    self._busy.add(number)
                    return number
                if len(self._found) + len(self._busy) < len(self._threads) + 1:
                    for ahead in range(number + 1, len(self._entries)):
                        if ahead not in self._found and ahead not in self._busy | self._over:
                            self._busy.add(ahead)
                            return ahead
                self._changed.wait()
        return None

    def _find(self, number: int) -> FloatVector:
        entry = self._entries[number]
        try:
            with one_blas_thread():
                solved = self._solve(entry)
            found = (solved * scaling_of(self._task, entry)).astype(np.float32).reshape(-1)
            with self._changed:
                self._found[number] = found
            return found
        finally:
            # After an error too: who waits tries for itself, and raises as well.
            with self._changed:
                self._busy.discard(number)
                self._changed.notify_all()


def span_of(task: MergeTask, entry: Entry) -> int:
    """The number of the span a tensor lies in."""
    index = task.values_at(np.arange(len(task.spans), dtype=np.float64), [(entry.offset, 0)])
    return int(index[0])


def scaling_of(task: MergeTask, entry: Entry) -> float:
    """λ of one tensor."""
    return float(task.scaling[span_of(task, entry)])


def shares_of(task: MergeTask, entry: Entry, method: str) -> NDArray[np.float64]:
    """The models' weights for a tensor, divided by their sum.

    Raises `MergeError` for negative ones, and where all are 0.
    """
    weights = task.weights[:, span_of(task, entry)]
    if (weights < 0).any() or not weights.sum() > 0:
        raise MergeError(
            f"{method} weighs least squares: weights {weights.tolist()} of {entry.name!r} must be "
            "at least 0, and one of them above it"
        )
    return weights / weights.sum()


def read_matrix(source: DeltaSource, entry: Entry, number: int, transposed: bool) -> Matrix:
    """A model's delta of a tensor in float64, (out, in); raises `MergeError` where not finite."""
    piece = np.empty(entry.size, np.float32)
    source.read(entry.offset, entry.stop, piece)
    if not np.isfinite(piece).all():
        raise MergeError(
            f"model {number}: {entry.name!r} holds a NaN or an infinity; leave this model out, or "
            "train it again",
            reason="non-finite",
        )
    matrix = piece.reshape(entry.shape).astype(np.float64)
    return np.ascontiguousarray(matrix.T) if transposed else matrix
