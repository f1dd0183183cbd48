"""The table of robust stages: bounds, momentum, what comes before a rule, and the rules.

A rule is written as stages joined by "+", in this order: any number of bounds, momentum, bounds
again, what pre-aggregates, and one rule (the mean where none is named). n are the vectors that a
stage is given, f those of them that may be anything at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from dare_agg.robust.before import (
    bounded_norms,
    bounded_weights,
    bucketed,
    nearest_mixed,
)
from dare_agg.robust.mixture import Mixture, Numbers
from dare_agg.robust.rows import Matrix
from dare_agg.robust.selection import (
    centered_clipping,
    geometric_median,
    krum,
    mean,
    multi_krum,
)
from dare_agg.robust.votes import median, trimmed_mean

BOUND, MOMENTUM, BEFORE, RULE = "bound", "momentum", "before", "rule"


def _majority(f: int, after: int, numbers: Mapping[str, float]) -> int:
    return max(after, 2 * f + 1)


@dataclass(frozen=True)
class Number:
    """A number of a stage: its default and its bounds; ``whole`` numbers are integers."""

    default: float
    low: float = 0.0
    high: float = math.inf
    whole: bool = False


@dataclass(frozen=True)
class Stage:
    """A row of `STAGES`.

    ``kind`` says where it may stand. ``least`` gives the fewest vectors it needs for f and its
    numbers, where what follows needs ``after``; ``votes`` whether it compares clients, by element
    or by distance, for which they must send the same elements; ``guards`` whether it limits what
    one client can do to the result. A rule has one of two forms: ``combine`` returns how much of
    each vector is in the result, ``elementwise`` the result of a block of them.
    """

    kind: str
    formula: str
    reference: str
    numbers: Mapping[str, Number] = field(default_factory=dict)
    least: Callable[[int, int, Mapping[str, float]], int] = _majority
    votes: bool = True
    guards: bool = True
    change: Callable[[Mixture, int, Mapping[str, float], np.random.Generator], Mixture] | None = (
        None
    )
    combine: Callable[[Mixture, int, Mapping[str, float]], Numbers] | None = None
    elementwise: Callable[[Matrix, int], Numbers] | None = None


def _krum_least(f: int, after: int, numbers: Mapping[str, float]) -> int:
    return max(after, 2 * f + 3)


def _bucketing_least(f: int, after: int, numbers: Mapping[str, float]) -> int:
    return max(2 * f + 1, int(numbers["size"]) * (after - 1) + 1)


STAGES: Mapping[str, Stage] = MappingProxyType(
    {
        "norm-bound": Stage(
            BOUND,
            "x·min(1, b/‖x‖), b = limit, or times·median of the round's norms where that is 0",
            "Sun et al. 2019, arXiv 1911.07963",
            MappingProxyType({"times": Number(1, 1e-3, 1e6), "limit": Number(0)}),
            change=bounded_norms,
            votes=False,
        ),
        "weight-bound": Stage(
            BOUND,
            "no client weighs more than times·median of the round's weights (for mean alone)",
            "as weight_bound",
            MappingProxyType({"times": Number(1, 1, 1e6)}),
            change=bounded_weights,
            votes=False,
            guards=False,
        ),
        "momentum": Stage(
            MOMENTUM,
            "m = beta·m + (1−beta)·x for each client, on the server; m/(1−betaᵗ) goes on",
            "RoSDHB, arXiv 2508.17129; Karimireddy et al. 2021, arXiv 2012.10333",
            MappingProxyType({"beta": Number(0.9, 0, 0.999)}),
            votes=False,
            guards=False,
        ),
        "nnm": Stage(
            BEFORE,
            "each vector becomes the mean of the n−f nearest to it, itself among them",
            "Allouah et al. 2023, arXiv 2302.01772",
            change=nearest_mixed,
            # A far vector stays among its own neighbours.
            guards=False,
        ),
        "bucketing": Stage(
            BEFORE,
            "means of buckets of ``size`` clients, drawn at random each round",
            "Karimireddy et al. 2022, arXiv 2006.09365",
            MappingProxyType({"size": Number(2, 2, 1 << 16, whole=True)}),
            least=_bucketing_least,
            change=bucketed,
            guards=False,
        ),
        "mean": Stage(
            RULE,
            "Σ wᵢ·xᵢ, the only rule in which weights count",
            "–",
            combine=mean,
            votes=False,
            guards=False,
        ),
        "median": Stage(
            RULE,
            "the median of each element",
            "Yin et al. 2018, arXiv 1803.01498",
            elementwise=median,
        ),
        "trimmed-mean": Stage(
            RULE,
            "the mean of each element without its f largest and f smallest",
            "Yin et al. 2018, arXiv 1803.01498",
            elementwise=trimmed_mean,
        ),
        "krum": Stage(
            RULE,
            "the vector nearest to its n−f−2 nearest others (``near`` where that is not 0)",
            "Blanchard et al. 2017, arXiv 1703.02757",
            MappingProxyType({"near": Number(0, 0, 1 << 16, whole=True)}),
            least=_krum_least,
            combine=krum,
        ),
        "multi-krum": Stage(
            RULE,
            "the mean of the ``keep`` best vectors by Krum's score (n−f where that is 0)",
            "Blanchard et al. 2017, arXiv 1703.02757",
            MappingProxyType(
                {
                    "keep": Number(0, 0, 1 << 16, whole=True),
                    "near": Number(0, 0, 1 << 16, whole=True),
                }
            ),
            least=_krum_least,
            combine=multi_krum,
        ),
        "geometric-median": Stage(
            RULE,
            "argmin Σ‖xᵢ − v‖, by ``steps`` of Weiszfeld's iteration from 0",
            "Pillutla et al. 2022, arXiv 1912.13445",
            MappingProxyType({"steps": Number(32, 1, 1000, whole=True)}),
            combine=geometric_median,
        ),
        "centered-clipping": Stage(
            RULE,
            "v + mean of (xᵢ − v)·min(1, r/‖xᵢ − v‖), ``steps`` times from 0; r = radius, or the "
            "median distance where that is 0",
            "Karimireddy et al. 2021, arXiv 2012.10333",
            MappingProxyType({"steps": Number(3, 1, 1000, whole=True), "radius": Number(0)}),
            combine=centered_clipping,
        ),
    }
)
