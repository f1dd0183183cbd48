"""A run's curves: what was measured and moved, round by round, as plain values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from dare_agg.runs.report.measures import Measure, measure_of
from dare_agg.runs.report.records import RoundRecord, RunRecord
from dare_agg.runs.rows import RunRow

# Curves nearer than this share of the plotted range are drawn on each other.
_ONE_LINE = 0.01
_MOST_SAID = 6


def run_series(run: RunRecord) -> dict[str, Any]:
    """The name of a run and its points: measures and noise, bytes of both ways so far, seconds."""
    rows = {row.round: row for row in run.rows}
    points: list[dict[str, Any]] = []
    up = down = 0.0
    for record in run.rounds:
        row = rows.get(record.number)
        up, down = up + _up(record, row), down + _down(record, row)
        points.append({**_point(record, row), "up": up, "down": down, "moved": up + down})
    return {"name": run.name, "method": run.method, "points": points}


def _up(record: RoundRecord, row: RunRow | None) -> float:
    told = row.upload_bytes if row is not None else 0
    return float(told or (record.upload + record.head_upload) * record.clients)


def _down(record: RoundRecord, row: RunRow | None) -> float:
    told = row.download_bytes if row is not None else 0
    return float(told or record.download * record.clients)


def _point(record: RoundRecord, row: RunRow | None) -> dict[str, Any]:
    said = {
        "round": record.number,
        "accuracy": record.accuracy,
        "perplexity": record.perplexity,
        "exact": record.exact_match,
        "loss": record.loss,
        "conflict": record.sign_conflict,
        "clients": record.clients,
        "seconds": record.seconds,
    }
    if row is not None:
        said |= {
            "trained": row.train_loss,
            "noise": row.noise,
            "noiseOfChange": row.noise_of_change,
            "accepted": row.accepted,
            "seconds": row.seconds,
        }
    return {key: value for key, value in said.items() if value is not None}


def totals(run: RunRecord) -> tuple[float, float]:
    """Bytes of all clients and rounds, up and down."""
    points = run_series(run)["points"]
    return (points[-1]["up"], points[-1]["down"]) if points else (0.0, 0.0)


def target_of(runs: Sequence[RunRecord]) -> float | None:
    """What runs are held to, as it is plotted: nearly the best that any of them reached."""
    measure = measure_of(runs)
    values = [found for run in runs for found in _plotted(run, measure).values()]
    if not values:
        return None
    best = measure.better(values)
    found = best / 0.95 if measure.log else 0.95 * best
    return float(f"{found:.3g}")


def _plotted(run: RunRecord, measure: Measure) -> dict[int, float]:
    found = ((record.number, measure.value(record)) for record in run.rounds)
    return {number: measure.plotted(value) for number, value in found if value is not None}


def coinciding(runs: Sequence[RunRecord], before: float | None = None) -> list[str]:
    """Says which curves of the main measure lie on each other, and how near they are.

    ``before`` is what was measured before the first round: it widens the plotted range.
    """
    measure = measure_of(runs)
    curves = [(run.name, _plotted(run, measure)) for run in runs]
    values = [value for _, curve in curves for value in curve.values()]
    if not values:
        return []
    axis = math.log if measure.log and min(values) > 0 else float
    places = [axis(value) for value in [*values, *([before] if before else [])]]
    room = _ONE_LINE * (max(places) - min(places))
    said = []
    for (one, a), (other, b) in itertools.combinations(curves, 2):
        both = sorted(a.keys() & b.keys())
        if not both:
            continue
        if max(abs(axis(a[number]) - axis(b[number])) for number in both) > room:
            continue
        apart = max(abs(a[number] - b[number]) for number in both)
        if apart == 0:
            how = "are the same"
        elif measure.log:
            how = f"differ by {apart:.2g} at most"
        else:
            how = f"differ by {apart:.2g} points at most"
        rounds = f"all {len(both)} rounds" if len(both) > 1 else "their round"
        said.append(f"{one} and {other} lie on each other: in {rounds} they {how}.")
    more = len(said) - _MOST_SAID
    return said[:_MOST_SAID] + ([f"So do {more} other pairs."] if more > 0 else [])
