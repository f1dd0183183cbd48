"""A rule at work: deltas of a round in, one delta and what was measured out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dare_agg.errors import MergeError
from dare_agg.robust.mixture import Mixture, combined, mixture_of, times
from dare_agg.robust.momentum import Momentum, moved
from dare_agg.robust.rows import Matrix, Rows, squared_norm
from dare_agg.robust.rule import Called, RobustRule
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import ArraySource, DeltaSource, Positions


@dataclass(frozen=True)
class RobustSource:
    """A rule's result, read in any part: as sparse as the deltas it is made of.

    ``parts`` say how much of each row is in the vectors that ``rule`` is given.
    """

    rows: Rows
    parts: Matrix
    rule: Called
    byzantine: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows.size

    @property
    def survivors(self) -> int:
        """Number of elements other than 0, at most."""
        return self.rows.survivors

    def sparse(self, lo: int, hi: int) -> Iterator[tuple[Positions, FloatVector]]:
        """As `dare_agg.vectors.sources.SparseSource`."""
        for positions, values in self.rows.pieces(lo, hi):
            vectors = combined(self.parts, values)
            vote = self.rule.row.elementwise
            result = vectors[0] if vote is None else vote(vectors, self.byzantine)
            yield positions, result.astype(np.float32)

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with elements ``lo`` to ``hi``."""
        out[:] = 0
        for positions, values in self.sparse(lo, hi):
            out[positions - lo] = values


@dataclass(frozen=True)
class Aggregated:
    """The result, each client's momentum after it, and what was measured.

    ``measured`` holds ``norms``, ``factors`` (what a bound left of each delta) and ``shares`` (how
    much of each delta, bounded, is in what the rule votes on, or in its result; they add up to 1
    where no radius shrinks it), a number a client.
    """

    delta: DeltaSource
    momenta: tuple[Momentum, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)


def aggregate(
    sources: Sequence[DeltaSource],
    weights: Sequence[float],
    rule: RobustRule,
    seed: Sequence[int] = (),
    momenta: Sequence[Momentum | None] | None = None,
) -> Aggregated:
    """Apply a rule to the deltas of a round, in the order of its clients.

    Reads them in tiles, once for their scalar products (O(n²k) for k survivors) and once where the
    result is read. ``seed`` decides what is drawn at random; ``momenta`` are those of the clients,
    None of one that is new; without any the rule's momentum is left out (of what is no delta).

    Raises `MergeError` for fewer deltas than the rule needs, for weights that are not as many or
    add up to nothing, and where deltas list other survivors.
    """
    if len(sources) < rule.least:
        raise MergeError(
            f"{len(sources)} updates; {str(rule)!r} bears {rule.byzantine} Byzantine clients of at "
            f"least {rule.least}: leave the model as it is"
        )
    counted = np.array(weights, np.float64)
    if counted.shape != (len(sources),) or not counted.sum() > 0 or counted.min() < 0:
        raise MergeError(f"weights {list(weights)}; {len(sources)} positive numbers are needed")
    draw = np.random.default_rng(np.random.SeedSequence(list(seed)))
    rows = Rows(sources)
    mixture = mixture_of(rows.products(), counted)
    before, after = rule.parts()
    kept: tuple[Momentum, ...] = ()
    norms, factors = mixture.norms, np.ones(len(sources))
    if rule.beta and momenta is not None:
        mixture = _changed(mixture, before, rule, draw)
        factors = np.diag(mixture.parts).copy()
        kept = tuple(
            moved(old, source, rule.beta, float(factor))
            for old, source, factor in zip(momenta, sources, factors, strict=True)
        )
        rows = Rows([ArraySource(one.vector) for one in kept])
        corrections = np.array([one.correction(rule.beta) for one in kept])
        mixture = mixture_of(rows.products(), mixture.weights).scaled(corrections)
        stages = after
    else:
        corrections = np.ones(len(sources))
        stages = (*before, *after)
    bounds = [called for called in stages if called.row.kind == "bound"]
    mixture = _changed(mixture, bounds, rule, draw)
    factors *= np.diag(mixture.parts) / corrections
    mixture = _changed(mixture, stages[len(bounds) :], rule, draw)
    parts = mixture.parts
    if rule.rule.row.combine is not None:
        shares = rule.rule.row.combine(mixture, rule.byzantine, rule.rule.numbers)
        parts = times(shares[None, :], parts)
    effective = np.where(factors > 0, parts.mean(axis=0) / np.where(factors > 0, factors, 1), 0)
    measured = {
        "norms": norms.tolist(),
        "factors": factors.tolist(),
        "shares": (effective / corrections).tolist(),
    }
    source = RobustSource(rows, parts, rule.rule, rule.byzantine)
    return Aggregated(source, kept, measured)


@dataclass(frozen=True)
class Bounded:
    """What the bounds of a round left: a factor and a weight a client."""

    norms: tuple[float, ...]
    factors: tuple[float, ...]
    weights: tuple[float, ...]


def bounded(sources: Sequence[DeltaSource], weights: Sequence[float], rule: RobustRule) -> Bounded:
    """The bounds of a rule that compares no clients: each delta is read by itself.

    So the deltas need not be of the same elements, and any method may merge what is left.
    """
    squares = np.diag([squared_norm(source) for source in sources])
    mixture = mixture_of(squares, np.array(weights, np.float64))
    norms = mixture.norms
    mixture = _changed(mixture, rule.stages, rule, np.random.default_rng(0))
    factors = np.diag(mixture.parts)
    return Bounded(tuple(norms.tolist()), tuple(factors.tolist()), tuple(mixture.weights.tolist()))


def _changed(
    mixture: Mixture, stages: Sequence[Called], rule: RobustRule, draw: np.random.Generator
) -> Mixture:
    for called in stages:
        if called.row.change is not None:
            mixture = called.row.change(mixture, rule.byzantine, called.numbers, draw)
    return mixture
