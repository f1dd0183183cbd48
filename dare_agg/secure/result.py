"""What a secure sum comes to: the merged delta, as server and parties both read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dare_agg.codec.mask import Mask
from dare_agg.codec.masked import MaskedSource
from dare_agg.errors import ConfigError, NonFiniteError, ProtocolError
from dare_agg.secure.aggregate import SecureMeasurements, Sums
from dare_agg.secure.packing import merge_dense, merge_sums
from dare_agg.secure.private import rescale_of
from dare_agg.secure.solved import SolvedSource, solve_sketches
from dare_agg.secure.terms import SecureTerms
from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.tiled import TiledVector

Merged = MaskedSource | SolvedSource


@dataclass(frozen=True)
class MergedSum:
    """The merged delta, rescaled where it is read; the merged dense part (None where there is
    none); what was measured."""

    delta: Merged
    dense: FloatVector | None
    measured: SecureMeasurements

    def vector(self) -> FloatVector:
        """The whole delta."""
        return vector_of(self.delta)

    def message(self) -> bytes:
        """The merged delta as parties are told it, who know the mask."""
        if isinstance(self.delta, SolvedSource):
            parts = [self.delta.mean.values, self.delta.factors]
        else:
            parts = [self.delta.values]
        return b"".join(part.astype("<f4", copy=False).tobytes() for part in parts)


def merged_sum(
    sums: Sums,
    terms: SecureTerms,
    mask: Mask,
    rule: str | None = None,
    scaling: float = 1.0,
    layout: Layout | None = None,
) -> MergedSum:
    """Read sums as ``rule`` does, times ``scaling``; ``layout``, the delta's, is for sketches.

    Raises `ConfigError` for a rule that the aggregate does not have, `ProtocolError` (reason
    "words") for sketches that no honest parties add up to.
    """
    count = terms.survivors
    values, measured = merge_sums(sums.part(0, count), terms.quantiser, rule)
    behind = count + terms.dense
    dense = None
    if terms.dense:
        dense = merge_dense(sums.part(count, behind), terms.quantiser)
    if terms.variance:  # was multiplied before it was clipped
        values /= rescale_of(mask)
    mean = MaskedSource(mask, values)
    if not terms.sketch:
        values *= np.float32(scaling)
        return MergedSum(mean, dense, measured)
    if layout is None:
        raise ConfigError("Gram matrices were summed; give the layout of the delta")
    plan = terms.sketch_plan(layout)
    factors = solve_sketches(
        mean, plan, sums.total[behind : terms.values], terms.quantiser, sums.parties
    )
    values *= np.float32(scaling)
    for _, _, left in plan.parts():
        factors[left] *= np.float32(scaling)
    return MergedSum(SolvedSource(mean, plan, factors), dense, measured)


def result_bytes(terms: SecureTerms) -> int:
    """How long `MergedSum.message` is."""
    return 4 * (terms.survivors + terms.sketch)


def read_result(terms: SecureTerms, mask: Mask, layout: Layout, data: bytes) -> Merged:
    """The merged delta that a server tells its parties.

    Raises `ProtocolError` (reason "malformed") for another length, `NonFiniteError` for values that
    are no numbers.
    """
    if len(data) != result_bytes(terms):
        raise ProtocolError(
            f"a result of {len(data)} bytes; {result_bytes(terms)} are due", reason="malformed"
        )
    values = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise NonFiniteError("the result holds a NaN or an infinity; refused")
    mean = MaskedSource(mask, values[: terms.survivors])
    if not terms.sketch:
        return mean
    return SolvedSource(mean, terms.sketch_plan(layout), values[terms.survivors :])


def vector_of(delta: Merged) -> FloatVector:
    """A merged delta as one vector."""
    if isinstance(delta, MaskedSource):
        return delta.mask.scatter(delta.values)
    return TiledVector(delta)[:]
