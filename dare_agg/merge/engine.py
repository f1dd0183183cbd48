"""The tiled merge engine: any number of deltas of any size, in bounded memory.

A method's row prepares a kernel (methods that need a global figure, such as TIES its
thresholds, read the sources once for it), then the kernel writes the merged delta tile by
tile. Where deltas list few survivors, memory is O(tile) whatever the number of models; TIES and
methods of its kind on whole rows take O(tile × models). Models are added in their given order,
element by element, and sums over tensors are taken in fixed blocks, so neither tile size nor
threads change a bit; give the models in an order of their own (`dare_agg.offline.merging` sorts
them by content) and neither does the order in which they came.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.rotation import GROUP
from dare_agg.errors import MergeError
from dare_agg.merge.agreement import Agreement
from dare_agg.merge.methods import find_method
from dare_agg.merge.task import Kernel, MergeTask, Scratch, Span, Statistics, is_sparse
from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.sources import DeltaSource, SparseSource

TILE = 1 << 16
# Elements that all threads' tiles have together, at most, where sources list few survivors.
_LARGEST_TILES = 1 << 21
# Fewer tiles than this for each thread are cut so that all threads get as much.
_UNEVEN = 8


@dataclass(frozen=True)
class MergeMeasurements:
    """What a merge saw on the way.

    ``sign_conflict`` is the share of elements with at least two non-zero entries whose signs
    differ; ``touched`` the share with at least one, of which ``lone`` have exactly one.
    ``survivors_per_element`` is n(1−p); below about 2 TIES is task arithmetic.
    """

    models: int
    parameters: int
    touched: float
    lone: float
    sign_conflict: float
    survivors_per_element: float


def merge_deltas(
    layout: Layout,
    sources: Sequence[DeltaSource],
    method: str,
    *,
    weights: Sequence[float] | NDArray[np.float64] | None = None,
    scaling: float | NDArray[np.float64] = 1.0,
    options: Mapping[str, Any] | None = None,
    tile: int = TILE,
    threads: int = 1,
    out: FloatVector | None = None,
    keep: Sequence[float] | None = None,
    base: DeltaSource | None = None,
    statistics: Sequence[Statistics] = (),
    measure: bool = True,
) -> tuple[FloatVector, MergeMeasurements]:
    """Merge deltas into one: ``scaling`` times the method's combination.

    ``weights`` default to the method's own (1/n or 1 each). ``keep`` is each source's
    survival rate 1 − p, for the measurements: sources are rescaled already, so what TIES divides
    by, the n(1−p) sources that keep an element on average, is Σ\\|w\\| here. ``base`` is needed
    by methods on whole models, ``statistics`` by fisher (arrays by name, or a source) and regmean.

    Raises `MergeError` for no model, another size or a weight that is no number, and
    `ConfigError` for an unknown method or option.
    """
    run = MergeRun(
        layout, sources, method, weights=weights, scaling=scaling, options=options, tile=tile,
        threads=threads, keep=keep, base=base, statistics=statistics, measure=measure,
    )  # fmt: skip
    merged = np.empty(layout.size, np.float32) if out is None else out
    run_tiles(run.task, lambda lo, hi, own: run.write(lo, hi, merged[lo:hi], own), threads)
    return merged, run.measured()


class MergeRun:
    """A merge that is ready to be written tile by tile; the words are those of `merge_deltas`."""

    def __init__(
        self,
        layout: Layout,
        sources: Sequence[DeltaSource],
        method: str,
        *,
        weights: Sequence[float] | NDArray[np.float64] | None = None,
        scaling: float | NDArray[np.float64] = 1.0,
        options: Mapping[str, Any] | None = None,
        tile: int = TILE,
        threads: int = 1,
        keep: Sequence[float] | None = None,
        base: DeltaSource | None = None,
        statistics: Sequence[Statistics] = (),
        measure: bool = True,
    ) -> None:
        if threads < 1:
            raise MergeError(f"threads = {threads}; at least 1 is needed")
        self._layout, self._threads = layout, threads
        self._models = len(sources)
        self._survivors = sum(keep) if keep is not None else float(len(sources))
        self._agreement = Agreement(sources) if measure else None
        self._tile = _grown(tile, sources, threads)
        self._kernel, self.task = prepare_merge(
            layout, self._agreement.observed if self._agreement else sources, method,
            weights=weights, scaling=scaling, options=options, tile=self._tile, base=base,
            statistics=statistics,
        )  # fmt: skip
        self._counts = np.zeros((-(-layout.size // self._tile), 3), np.int64)

    def write(self, lo: int, hi: int, out: FloatVector, scratch: Scratch) -> None:
        """Write the merged delta of one of the task's tiles to ``out``."""
        if self._agreement is None:
            self._kernel(lo, hi, out, scratch)
            return
        self._agreement.begin(lo, hi, scratch)
        self._kernel(lo, hi, out, scratch)
        self._counts[lo // self._tile] = self._agreement.finish()

    def tiles(self) -> Iterator[tuple[int, FloatVector]]:
        """Yield ``(first, merged)`` for every tile, in order, each valid until the next.

        Threads write as many tiles ahead as there are threads. May be asked for again.
        """
        spans = self.task.tiles()
        if self._threads == 1:
            scratch = Scratch()
            room = np.empty(min(self._tile, self._layout.size), np.float32)
            for lo, hi in spans:
                self.write(lo, hi, room[: hi - lo], scratch)
                yield lo, room[: hi - lo]
            return
        own = threading.local()

        def written(span: Span) -> tuple[int, FloatVector]:
            if not hasattr(own, "scratch"):
                own.scratch = Scratch()
            lo, hi = span
            room = np.empty(hi - lo, np.float32)
            self.write(lo, hi, room, own.scratch)
            return lo, room

        with ThreadPoolExecutor(self._threads) as pool:
            waiting = deque(pool.submit(written, s) for s in islice(spans, self._threads))
            while waiting:
                tile = waiting.popleft().result()
                waiting.extend(pool.submit(written, span) for span in islice(spans, 1))
                yield tile

    def measured(self) -> MergeMeasurements:
        """What was seen, once all tiles are written."""
        touched, lone, conflict = (int(c) for c in self._counts.sum(axis=0))
        return MergeMeasurements(
            models=self._models,
            parameters=self._layout.size,
            touched=touched / max(1, self._layout.size),
            lone=lone / max(1, touched),
            sign_conflict=conflict / max(1, touched - lone),
            survivors_per_element=self._survivors,
        )


def prepare_merge(
    layout: Layout,
    sources: Sequence[DeltaSource],
    method: str,
    *,
    weights: Sequence[float] | NDArray[np.float64] | None = None,
    scaling: float | NDArray[np.float64] = 1.0,
    options: Mapping[str, Any] | None = None,
    tile: int = TILE,
    base: DeltaSource | None = None,
    statistics: Sequence[Statistics] = (),
    writes_model: bool = False,
) -> tuple[Kernel, MergeTask]:
    """Check everything, make the passes a method needs, and return its kernel.

    ``weights`` may be (models, tensors) and ``scaling`` (tensors,), in layout order. With
    ``writes_model`` the kernel of a method on whole models writes base + delta; the task says
    whether it does.

    Raises `MergeError` for no model, other sizes, and weights or scaling that are not finite or of
    another shape; `ConfigError` for an unknown method or option.
    """
    row = find_method(method)
    settled = row.settle(options or {})
    count = len(sources)
    if not count:
        raise MergeError("no model to merge; give at least one")
    for i, source in enumerate(sources):
        if source.size != layout.size:
            raise MergeError(
                f"model {i} has {source.size} parameters, the layout {layout.size}; merge models "
                "of one architecture"
            )
    if tile < 1:
        raise MergeError(f"tile = {tile}; at least 1 is needed")
    default = [1 / count if row.mean else 1.0] * count
    shares = np.asarray(default if weights is None else weights, np.float64)
    factor = np.asarray(scaling, np.float64)
    if shares.shape[:1] != (count,) or not np.isfinite(shares).all():
        raise MergeError(f"weights {shares.tolist()}; {count} finite numbers are needed")
    if not np.isfinite(factor).all():
        raise MergeError(f"scaling = {factor.tolist()}; a finite number is needed")
    spans: tuple[Span, ...] = ((0, layout.size),)
    if shares.ndim == 2 or factor.ndim == 1:
        entries = layout.entries
        shares = shares if shares.ndim == 2 else np.tile(shares[:, None], (1, len(entries)))
        factor = factor if factor.ndim == 1 else np.full(len(entries), float(factor))
        if shares.shape[1] != len(entries) or factor.shape != (len(entries),):
            raise MergeError(f"per-tensor weights or scaling need {len(entries)} columns")
        used = [i for i, entry in enumerate(entries) if entry.size]
        spans = tuple((entries[i].offset, entries[i].stop) for i in used)
        shares, factor = shares[:, used], factor[used]
    else:
        shares, factor = shares[:, None], factor[None]
    task = MergeTask(
        layout, tuple(sources), spans, shares, factor, settled, tile, base, tuple(statistics),
        writes_model=writes_model and row.writes_models,
    )  # fmt: skip
    if not layout.size:
        return (lambda lo, hi, out, scratch: None), task
    return row.prepare(task), task


def _grown(tile: int, sources: Sequence[DeltaSource], threads: int) -> int:
    """The tile, or a larger one where all sources list few survivors.

    Every list has its cost, and a group of values is decoded again where a tile ends inside it
    and it is not kept: tiles are whole groups of the densest source, or quarters (the steps in
    which masks are drawn), as far as there is room.
    """
    if tile < 1 or not sources or not all(map(is_sparse, sources)):
        return tile
    size = sources[0].size
    share = max(cast(SparseSource, source).survivors / size for source in sources)
    widest = _LARGEST_TILES // threads
    fitting = [round(n / share) for n in (GROUP, GROUP // 4) if share and n <= widest * share]
    grown = max(tile, fitting[0] if fitting else widest)
    if threads > 1 and size < _UNEVEN * threads * grown:
        rows = -(-size // (threads * grown))
        grown = max(tile, -(-size // (threads * rows)))
    return grown


def run_tiles(task: MergeTask, work: Callable[[int, int, Scratch], None], threads: int = 1) -> None:
    """Call ``work(lo, hi, scratch)`` for every tile, each thread with its own scratch."""
    if threads == 1:
        scratch = Scratch()
        for lo, hi in task.tiles():
            work(lo, hi, scratch)
        return
    tiles = list(task.tiles())

    def run(first: int) -> None:
        scratch = Scratch()
        for lo, hi in tiles[first::threads]:
            work(lo, hi, scratch)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))
