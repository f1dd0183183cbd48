"""Directions that travel with an update: by what clients' own changes look at, they are merged.

Where a round merges by the deltas' own Gram matrices (`dare_agg.merge.wudi`), each client sends
the leading directions of each Linear's whole change in few bits beside the survivors, as
``dare-agg diff --gram`` puts them into a file. The payload has a u16 for each Linear of the delta
group, in layout order, which says how many directions follow (fewer than asked for where a
change has fewer, 0 where there is none), and the section of `dare_agg.codec.directions`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from dare_agg.codec.derive import derive_key
from dare_agg.codec.directions import (
    Directed,
    DirectionsPlan,
    decode_directions,
    encode_directions,
    gram_values,
    plan_directions,
)
from dare_agg.errors import ConfigError, UpdateError
from dare_agg.merge.directions import check_rank, directions_of
from dare_agg.merge.linears import Linear, model_linears
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.sources import DeltaSource

# Of each Linear, and bits of an element: docs/RESULTS.md has others.
DIRECTIONS, DIRECTION_BITS = 8, 4
_COUNT = np.dtype("<u2")
# Directions are orthogonal and come by size; few bits bend them, the more the shorter they are.
_ALIKE, _LONG = 0.9, 64
_LONGER = 1.05


def check_directions(terms: UpdateTerms) -> None:
    """Raise `ConfigError` for numbers of directions or bits that no update carries."""
    check_rank(terms.directions)
    gram_values(terms.direction_bits)


def linears_of_round(layout: Layout) -> Mapping[str, Linear]:
    """The Linears of the delta group; raises `ConfigError` where it has none."""
    linears = model_linears(layout)
    if not linears:
        raise ConfigError(
            "merging by wudi needs Linears (weights of two dimensions) among what is merged, and "
            "this model has none outside dense and exclude; merge by task-arithmetic or ties"
        )
    return linears


def most_bytes(terms: UpdateTerms, layout: Layout) -> int:
    """Bytes of the payload where every Linear has all directions: known before it arrives."""
    linears = linears_of_round(layout)
    plan = _plan(terms, layout, [_most(terms, one) for one in linears.values()])
    return _COUNT.itemsize * len(linears) + plan.nbytes(layout)


def encode_round_directions(plan: RoundPlan, layout: Layout, change: DeltaSource) -> bytes:
    """The payload of one client's whole ``change``. Raises as `directions_of`."""
    linears = linears_of_round(layout)
    found = {
        name: (rows, axis)
        for name, rows, axis in directions_of(change, linears, plan.terms.directions)
    }
    counts = np.array([len(found[n][0]) if n in found else 0 for n in linears], _COUNT)
    section = b""
    if found:
        sent = plan_directions(layout, found, gram_values(plan.terms.direction_bits))
        section = encode_directions(layout, sent, found, *_bound(plan))
    return counts.tobytes() + section


def decode_round_directions(plan: RoundPlan, layout: Layout, blob: bytes) -> dict[str, FloatVector]:
    """σⱼ·vⱼ of each Linear, (rank, in), by name, checked.

    Raises `UpdateError` with its reason: another length, more directions than asked for, a
    checksum or values that do not fit, directions that are none (`_check`).
    """
    linears = linears_of_round(layout)
    head = _COUNT.itemsize * len(linears)
    most = most_bytes(plan.terms, layout)
    if not head <= len(blob) <= most:
        raise UpdateError(
            f"directions of {len(blob)} bytes; {head} to {most} are possible: send them again",
            reason="truncated" if len(blob) < head else "oversized",
        )
    counts = [int(count) for count in np.frombuffer(blob, _COUNT, len(linears))]
    for (name, linear), count in zip(linears.items(), counts, strict=True):
        if count > _most(plan.terms, linear):
            raise UpdateError(
                f"{count} directions of {name[:80]!r}, at most {_most(plan.terms, linear)} were "
                "asked for",
                reason="shape",
            )
    sent = _plan(plan.terms, layout, counts)
    if not sent.tensors:
        if len(blob) != head:
            raise UpdateError("bytes behind directions of no Linear", reason="trailing")
        return {}
    found = decode_directions(sent, layout, memoryview(blob)[head:], *_bound(plan)).decoded()
    for name, rows in found.items():
        _check(name, rows)
    return found


def _check(name: str, rows: FloatVector) -> None:
    """Refuse rows that no change has as its leading directions: by size, and orthogonal."""
    wide = rows.astype(np.float64)
    sizes = np.sqrt(np.square(wide).sum(axis=1))
    if not (sizes > 0).all() or (sizes[1:] > _LONGER * sizes[:-1]).any():
        raise UpdateError(
            f"directions of {name[:80]!r} are empty or not by size; send those of the change",
            reason="directions",
        )
    if rows.shape[1] < _LONG:
        return
    cosines = np.abs((wide / sizes[:, None]) @ (wide / sizes[:, None]).T)
    np.fill_diagonal(cosines, 0)
    if cosines.max() > _ALIKE:
        raise UpdateError(
            f"two directions of {name[:80]!r} have a cosine of {cosines.max():.3g}; those of a "
            "change are orthogonal",
            reason="directions",
        )


def _most(terms: UpdateTerms, linear: Linear) -> int:
    return min(terms.directions, *linear.shape)


def _plan(terms: UpdateTerms, layout: Layout, counts: list[int]) -> DirectionsPlan:
    numbers = {entry.name: index for index, entry in enumerate(layout.entries)}
    tensors = tuple(
        Directed(numbers[name], count, 0 if linear.transposed else 1)
        for (name, linear), count in zip(linears_of_round(layout).items(), counts, strict=True)
        if count
    )
    return DirectionsPlan(tensors, gram_values(terms.direction_bits))


def _bound(plan: RoundPlan) -> tuple[bytes, bytes]:
    """The key of a plan's directions, and what their checksum binds them to."""
    context = hashlib.sha256(b"directions\0" + plan.digest()).digest()
    return derive_key(plan.values_key, "directions"), context
