"""The client's half of a round: trained arrays in, an update out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dare_agg.codec.update import encode_update
from dare_agg.errors import (
    BaseMismatchError,
    LayoutError,
)
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.same_code import check_same_code
from dare_agg.rounds.statistics import (
    Statistics,
    StatisticsUpdate,
    encode_statistics,
)
from dare_agg.vectors.layout import FloatVector, check_finite
from dare_agg.vectors.model import Arrays, GlobalModel, global_model
from dare_agg.vectors.returned import returned_tensors
from dare_agg.vectors.sources import SAFE_DELTA


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
        """Bytes of the payloads that travel: update, dense part and statistics."""
        statistics = self.statistics.blob if self.statistics else b""
        return len(self.blob) + len(self.dense_blob or b"") + len(statistics)


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

    Raises `UpdateError` for a plan of another codec or package, `BaseMismatchError` when
    ``base`` is not the state the plan names, `LayoutError` for unknown or reshaped tensors,
    `ApartError` for tied ones that are tied no more,
    `NonFiniteError` when training produced a NaN or an infinity.
    """
    check_same_code(plan.codec, plan.package, "the round plan", "this client")
    model = model_of_plan(plan, base, by_form=by_form, apart=apart)
    groups = model.groups
    tuned = groups.completed(base, returned_tensors(base, tuned, plan.terms.exclude))
    tuned_delta = groups.layout.flatten(tuned)
    check_finite(groups.layout, tuned_delta, "after training")
    norm, largest, above = _measure(model.delta[:], tuned_delta)
    blob = encode_update(plan.spec(), (model.delta[:], tuned_delta))
    dense_spec, dense_blob = plan.dense_spec(), None
    if dense_spec is not None:
        tuned_dense = groups.flatten_dense(tuned)
        check_finite(groups.dense_layout, tuned_dense, "after training")
        dense_blob = encode_update(dense_spec, (model.dense, tuned_dense))
    encoded = None
    if plan.terms.statistics:
        found = dict(statistics or {})
        for copy, first in groups.copies.items():
            if copy in found:
                found.setdefault(first, found.pop(copy))
        encoded = encode_statistics(plan, groups.layout, found)
    return ClientUpdate(blob, dense_blob, norm, largest, above, encoded)


def model_of_plan(
    plan: RoundPlan, arrays: Arrays, *, by_form: bool = False, apart: Iterable[str] = ()
) -> GlobalModel:
    """Read ``arrays`` as the state of the global model that the plan names, and check it.

    Raises `LayoutError` (other tensors) or `BaseMismatchError` (other values).
    """
    terms = plan.terms
    model = global_model(
        arrays, dense=terms.dense, exclude=terms.exclude, by_form=by_form, apart=apart
    )
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
    return model


def _measure(base: FloatVector, tuned: FloatVector) -> tuple[float, float, float]:
    squares, largest, above = 0.0, 0.0, 0
    for lo in range(0, base.size, 1 << 16):
        piece = np.abs(tuned[lo : lo + (1 << 16)] - base[lo : lo + (1 << 16)])
        squares += float(np.sum(piece * piece, dtype=np.float64))
        largest = max(largest, float(piece.max()))
        above += int(np.count_nonzero(piece > np.float32(SAFE_DELTA)))
    return math.sqrt(squares), largest, above / base.size
