"""The client's half of a round: what training made of a version in, an update out."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.fitted_rates import (
    add_squares,
    fitted_rates,
    levels_of,
    tensor_squares,
)
from dare_agg.codec.update import UpdateSpec, encode_update
from dare_agg.errors import (
    BaseMismatchError,
    ConfigError,
    LayoutError,
)
from dare_agg.rounds.directions import encode_round_directions
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.same_code import check_same_code
from dare_agg.rounds.statistics import (
    Statistics,
    StatisticsUpdate,
    encode_statistics,
)
from dare_agg.vectors.layout import FloatVector, Layout, check_finite
from dare_agg.vectors.model import Arrays, GlobalModel, global_model
from dare_agg.vectors.returned import returned_tensors
from dare_agg.vectors.sources import (
    SAFE_DELTA,
    ArraySource,
    CachedSource,
    DeltaSource,
    DifferenceSource,
)
from dare_agg.vectors.tensors import TensorSource
from dare_agg.vectors.tiled import AnyVector, TiledVector, tiles

_PIECE = 1 << 16


@dataclass(frozen=True)
class ClientUpdate:
    """One client's answer to a plan, and what it measured of its own full delta."""

    blob: bytes
    dense_blob: bytes | None
    delta_norm: float
    delta_max: float
    share_above: float  # of |delta| > SAFE_DELTA
    statistics: StatisticsUpdate | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the payloads that travel: update, dense part, statistics or directions."""
        statistics = self.statistics.blob if self.statistics else b""
        return len(self.blob) + len(self.dense_blob or b"") + len(statistics)


@dataclass(frozen=True)
class Measured:
    """What is measured of a full delta: its norm, largest size, share above `SAFE_DELTA`.

    ``squares`` are those of each tensor (`tensor_squares`), where they were asked for.
    """

    norm: float
    largest: float
    above: float
    squares: NDArray[np.float64] | None = None


def make_client_update(
    plan: RoundPlan,
    base: Arrays,
    tuned: Arrays,
    statistics: Statistics | None = None,
    *,
    by_form: bool = False,
    apart: Iterable[str] = (),
) -> ClientUpdate:
    """Turn trained arrays (and statistics of them) into the update the plan asks for.

    ``base`` are the arrays the training started from, ``tuned`` what it returned: all of them,
    or a part (`returned_tensors`). ``by_form`` and ``apart`` are as in
    `split_tensors`.

    Raises as `update_of_arrays`, and `BaseMismatchError` when ``base`` is not the state the plan
    names.
    """
    model = model_of_plan(plan, base, by_form=by_form, apart=apart)
    return update_of_arrays(
        plan, model, returned_tensors(base, tuned, plan.terms.exclude), statistics
    )


def update_of_arrays(
    plan: RoundPlan,
    start: GlobalModel,
    returned: Arrays,
    statistics: Statistics | None = None,
) -> ClientUpdate:
    """As `client_update`, of arrays that training returned by the names of ``start``.

    Those that are not there did not change. Raises `LayoutError` for reshaped tensors and
    `ApartError` for tied ones that are tied no more, too.
    """
    groups = start.groups
    tuned = groups.settled(returned)
    arrays: Arrays = ChainMap(tuned, start.arrays())  # type: ignore[arg-type]
    tuned_dense = groups.flatten_dense({name: arrays[name] for name in groups.dense_layout.names})
    source = TensorSource(groups.layout, tuned, _source(start.delta))
    return client_update(plan, start, source, tuned_dense, statistics)


def client_update(
    plan: RoundPlan,
    start: GlobalModel,
    tuned: DeltaSource,
    tuned_dense: FloatVector,
    statistics: Statistics | None = None,
    measured: Measured | None = None,
) -> ClientUpdate:
    """Turn what training made of ``start`` into the update the plan asks for, tile by tile.

    ``tuned`` is read over the delta group's layout: all of it to be measured, unless whoever
    calls has ``measured`` it, and found it finite, where it lies; then its survivors (`take`).
    Where training loaded ``start`` as parameters of fewer bits, ``start`` is what it loaded:
    `dare_agg.vectors.rounded.rounded_model`.

    Raises `UpdateError` for a plan of another codec or package, `BaseMismatchError` when
    ``start`` is not the state the plan names, `LayoutError` for another model,
    `NonFiniteError` when training produced a NaN or an infinity.
    """
    check_same_code(plan.codec, plan.package, "the round plan", "this client")
    check_start(plan, start)
    layout = start.groups.layout
    if measured is None:
        measured = measure(layout, start.delta, tuned, by_tensor=plan.terms.keep_rates == "own")
    change = DifferenceSource(CachedSource(_source(start.delta)), tuned)
    blob = encode_update(settled_spec(plan, layout, change, measured.squares), change)
    return completed_update(plan, start, blob, tuned_dense, measured, statistics, change)


def settled_spec(
    plan: RoundPlan,
    layout: Layout,
    change: DeltaSource,
    squares: NDArray[np.float64] | None = None,
) -> UpdateSpec:
    """What the update of ``change`` must be, with this client's own keep rates where it has them.

    For these the change is read once more, unless its tensors' ``squares`` are known. Raises as
    `RoundPlan.spec`.
    """
    spec = plan.spec(layout)
    if spec.rates is None or spec.rates.told:
        return spec
    if squares is None:
        squares = tensor_squares(layout.sizes, change)
    levels = levels_of(layout.sizes, squares)
    return replace(spec, rates=fitted_rates(layout.sizes, levels, spec.drop_rate, spec.values))


def completed_update(
    plan: RoundPlan,
    start: GlobalModel,
    blob: bytes,
    tuned_dense: FloatVector,
    measured: Measured,
    statistics: Statistics | None = None,
    change: DeltaSource | None = None,
) -> ClientUpdate:
    """The whole answer to a plan around the delta group's update, ``blob``; raises so too.

    ``change`` is the whole delta, of which the plan may ask directions. Raises `ConfigError` where
    it does and there is none.
    """
    groups = start.groups
    dense_spec, dense_blob = plan.dense_spec(), None
    if dense_spec is not None:
        check_finite(groups.dense_layout, tuned_dense, "after training")
        dense_blob = encode_update(dense_spec, (start.dense, tuned_dense))
    encoded = None
    if plan.terms.statistics:
        found = dict(statistics or {})
        for copy, first in groups.copies.items():
            if copy in found:
                found.setdefault(first, found.pop(copy))
        encoded = encode_statistics(plan, groups.layout, found)
    if plan.terms.directions:
        if change is None:
            raise ConfigError(
                "directions of a change that lies in several processes are not made; train the "
                "model in one, or merge by a method that needs none (task-arithmetic, ties)"
            )
        encoded = StatisticsUpdate(encode_round_directions(plan, groups.layout, change))
    return ClientUpdate(blob, dense_blob, measured.norm, measured.largest, measured.above, encoded)


def model_of_plan(
    plan: RoundPlan, arrays: Arrays, *, by_form: bool = False, apart: Iterable[str] = ()
) -> GlobalModel:
    """Read ``arrays`` as the state of the global model that the plan names, and check it.

    Raises as `check_start`, and `UpdateError` for a plan of another codec or package.
    """
    check_same_code(plan.codec, plan.package, "the round plan", "this client")
    terms = plan.terms
    model = global_model(
        arrays, dense=terms.dense, exclude=terms.exclude, by_form=by_form, apart=apart
    )
    check_start(plan, model)
    return model


def check_start(plan: RoundPlan, model: GlobalModel) -> None:
    """Check that ``model`` is the state that the plan names.

    Raises `LayoutError` (other tensors) or `BaseMismatchError` (other values).
    """
    for what, ours, asked in (
        ("delta", model.groups.layout.fingerprint, plan.model.layout),
        ("dense", model.ref.dense_layout, plan.model.dense_layout),
    ):
        if ours != asked:
            raise LayoutError(
                f"the {what} group has layout {ours[:12]}, the plan asks for {asked[:12]}; the "
                "client's model has other names or shapes than the server's"
            )
    for what, ours, asked in (
        ("delta", model.ref.base, plan.model.base),
        ("dense", model.ref.dense_base, plan.model.dense_base),
    ):
        if ours != asked:
            raise BaseMismatchError(
                f"the {what} group has fingerprint {ours[:12]}, the plan asks for base "
                f"{asked[:12]}; fetch the global model again"
            )


def measure(
    layout: Layout, base: AnyVector, tuned: DeltaSource, *, by_tensor: bool = False
) -> Measured:
    """Measure tuned − base in one pass; raises `NonFiniteError` naming what is not finite."""
    squares, largest, above = 0.0, 0.0, 0
    sums = np.zeros(len(layout.sizes), np.float64) if by_tensor else None
    stops = np.cumsum(np.array(layout.sizes, np.int64))
    piece = np.empty(min(_PIECE, tuned.size), np.float32)
    for lo, begun in tiles(base, _PIECE):
        delta = piece[: begun.size]
        tuned.read(lo, lo + begun.size, delta)
        if not np.isfinite(delta).all():
            check_finite(layout, TiledVector(tuned), "after training")
        delta -= begun
        if sums is not None:
            add_squares(sums, stops, lo, delta)
        np.abs(delta, out=delta)
        largest = max(largest, float(delta.max()))
        above += int(np.count_nonzero(delta > np.float32(SAFE_DELTA)))
        if sums is None:
            squares += float(np.sum(delta * delta, dtype=np.float64))
    if sums is not None:
        squares = float(sums.sum())
    return Measured(math.sqrt(squares), largest, above / base.size, sums)


def _source(vector: AnyVector) -> DeltaSource:
    return vector.source if isinstance(vector, TiledVector) else ArraySource(vector)
