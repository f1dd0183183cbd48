"""A round of a job that is going on, and what it came to."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dare_agg.nvflare.answers import Answered
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.server import Rejection
from dare_agg.vectors.model import Arrays


@dataclass
class OpenRound:
    """A round that is going on: the plans by site, and what came of them so far."""

    number: int
    plans: Mapping[str, RoundPlan]
    started: float = field(default_factory=time.monotonic)
    answers: dict[str, Answered] = field(default_factory=dict)
    rejections: dict[str, Rejection] = field(default_factory=dict)
    download: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """What a round came to: the model's arrays, its measurements, and the answers merged."""

    arrays: Arrays
    moved: bool
    measurements: dict[str, Any]
    answers: Mapping[str, Answered]
    weights: tuple[float, ...] = ()


def round_measured(
    opened: OpenRound,
    answers: Mapping[str, Answered],
    rejections: Sequence[Rejection],
    names: Mapping[int, str],
) -> dict[str, Any]:
    """What a round measured, as plain values; lists follow the accepted sites' order."""
    taken = list(answers.values())
    return {
        "round": opened.number,
        "seconds": time.monotonic() - opened.started,
        "sampled": len(opened.plans),
        "accepted": len(taken),
        "clients": list(answers),
        "update_bytes": [one.update_bytes for one in taken],
        "dense_bytes": [one.dense_bytes for one in taken],
        "download_bytes": [opened.download.get(site, 0) for site in opened.plans],
        "examples": [one.accepted.weight for one in taken],
        "drop_rates": [
            one.accepted.plan.drop_rate.p
            if one.accepted.plan.rates is None
            else 1 - one.accepted.plan.keep
            for one in taken
        ],
        "values": [one.accepted.plan.terms.values for one in taken],
        "delta_norms": [one.receipt.delta_norm for one in taken],
        "rejected": [{**asdict(one), "name": names[one.client]} for one in rejections],
    }


def row_text(measurements: Mapping[str, Any]) -> str:
    """A round's measurements as a line of JSON; what is no number (a site may say so) is null.

    >>> row_text({"round": 1, "delta_norms": [0.5, math.nan]})
    '{"round": 1, "delta_norms": [0.5, null]}'
    """
    return json.dumps(_numbers(measurements), allow_nan=False)


def _numbers(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _numbers(each) for name, each in value.items()}
    return [_numbers(each) for each in value] if isinstance(value, list | tuple) else value
