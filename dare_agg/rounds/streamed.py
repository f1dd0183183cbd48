"""A round in one pass over tiles: from coded updates to the coded step, nothing held as a whole.

As `dare_agg.rounds.server.merge_round` and `advance`, for a version store on disk: each tile is
merged, goes through the server step, whose moments lie in the store's files, and is moved to the
grid there. Memory is a few tiles, the updates and the step as they are coded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.fitted_rates import add_squares
from dare_agg.downlink.disk.state import Moments
from dare_agg.downlink.protocol import DrawnMask
from dare_agg.downlink.store import VersionStore
from dare_agg.errors import StateError
from dare_agg.merge.engine import MergeRun
from dare_agg.rounds.levels import levels_told
from dare_agg.rounds.server import (
    Accepted,
    merge_dense_group,
    merging_order,
    merging_words,
    round_measured,
)
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import ServerStep, StepState
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.model import GlobalModel
from dare_agg.vectors.sources import DeltaSource
from dare_agg.vectors.tiled import TILE, TiledVector, retiled, tiles

_NORM_PIECE = 1 << 16


@dataclass(frozen=True)
class StreamedRound:
    """What is left of a round that was merged in one pass: its weights and measurements.

    ``tensor_squares`` are the sums of squares of each tensor's merged change.
    """

    weights: tuple[float, ...]
    measurements: dict[str, Any]
    tensor_squares: NDArray[np.float64]


def advance_streamed(
    model: GlobalModel,
    state: StepState,
    accepted: Sequence[Accepted],
    settings: FederatedSettings,
    store: VersionStore,
    plans: Sequence[DrawnMask],
) -> tuple[GlobalModel, StepState, StreamedRound]:
    """Merge the accepted updates, take the server step and move the store to the next version.

    ``plans`` are those of the updates. The state holds the number of rounds alone: its vectors lie
    in the store. Raises as `merge_round` and `VersionStore.advance_streamed`; after an error the
    store is where it was.
    """
    ordered, weights = merging_order(accepted, settings)
    merge = MergeRun(
        model.groups.layout,
        [reply.update for reply in ordered],
        settings.method,
        **merging_words(ordered, weights, settings),
    )
    dense = merge_dense_group(model, ordered, weights, settings)
    stream = _stepped(store, state, settings.server_step, _Merged(merge))
    stream.stops = np.cumsum(np.array(model.groups.layout.sizes, np.int64))
    moved = store.advance_streamed(model, stream, dense, plans, settings.server_step.vectors)
    norm = math.sqrt(math.fsum(stream.squares))
    measurements = round_measured(ordered, weights, norm, merge.measured())
    assert stream.sums is not None
    levels = b""
    if settings.terms.keep_rates == "last":
        levels = levels_told(model.groups.layout.sizes, stream.sums, plans)
    merged = StreamedRound(weights, measurements, stream.sums)
    return moved, StepState(state.count + 1, levels=levels), merged


def advance_merged(
    model: GlobalModel,
    state: StepState,
    merged: DeltaSource,
    dense: FloatVector | None,
    settings: FederatedSettings,
    store: VersionStore,
    plans: Sequence[DrawnMask],
) -> tuple[GlobalModel, StepState]:
    """As `advance_streamed`, for a delta that was merged elsewhere (a secure sum's)."""
    stream = _stepped(store, state, settings.server_step, _Read(merged))
    moved = store.advance_streamed(model, stream, dense, plans, settings.server_step.vectors)
    return moved, StepState(state.count + 1)


@dataclass(frozen=True)
class _Merged:
    merge: MergeRun

    def tiles(self) -> Iterator[tuple[int, FloatVector]]:
        return self.merge.tiles()


@dataclass(frozen=True)
class _Read:
    source: DeltaSource

    def tiles(self) -> Iterator[tuple[int, FloatVector]]:
        return tiles(TiledVector(self.source))


@dataclass
class _Stepped:
    """The server step of a merged delta, tile by tile; ``squares`` are of the delta itself."""

    merged: _Merged | _Read
    step: ServerStep
    size: int
    count: int
    moments: Moments
    squares: list[float] = field(default_factory=list)
    # Where each tensor ends, if its squares are wanted, and these.
    stops: NDArray[np.int64] | None = None
    sums: NDArray[np.float64] | None = None

    def tiles(self) -> Iterator[tuple[int, FloatVector]]:
        self.squares.clear()
        if self.stops is not None:
            self.sums = np.zeros(self.stops.size, np.float64)
        room = np.empty(min(TILE, self.size), np.float32)
        for lo, delta in retiled(self.merged.tiles(), self.size):
            for at in range(0, delta.size, _NORM_PIECE):
                piece = np.square(delta[at : at + _NORM_PIECE])
                self.squares.append(float(np.sum(piece, dtype=np.float64)))
            if self.stops is not None and self.sums is not None:
                add_squares(self.sums, self.stops, lo, delta)
            step = room[: delta.size]
            vectors = self.moments.read(lo, lo + delta.size)
            self.step.apply_tile(delta, step, vectors, self.count)
            self.moments.write(lo, vectors)
            yield lo, step


def _stepped(
    store: VersionStore, state: StepState, step: ServerStep, merged: _Merged | _Read
) -> _Stepped:
    # An app's own code may have moved the store in between; nobody else takes a step of a run.
    if state.count > store.count:
        raise StateError(
            f"the server step was taken {state.count} times, the store moved {store.count} times; "
            "resume both from the same round"
        )
    size = store.model.delta.size
    moments = store.moments(step.vectors, fresh=state.count == 0)
    return _Stepped(merged, step, size, state.count + 1, moments)
