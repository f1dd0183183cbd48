"""By what a report tells how good models are: accuracy, or a language model's perplexity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dare_agg.runs.report.records import RoundRecord, RunRecord


@dataclass(frozen=True)
class Measure:
    """A measure of a round: ``title`` of its column, ``label`` of its axis.

    ``plotted`` is a value as the axis has it, ``shown`` as people read it; ``better`` picks the
    best of several values, ``log`` says whether its axis is logarithmic.
    """

    title: str
    label: str
    value: Callable[[RoundRecord], float | None]
    plotted: Callable[[float], float]
    shown: Callable[[float], str]
    better: Callable[[Sequence[float]], float]
    log: bool = False

    def last(self, run: RunRecord) -> float | None:
        """The value after the last round that was evaluated."""
        values = [self.value(record) for record in run.rounds]
        return next((value for value in reversed(values) if value is not None), None)


ACCURACY = Measure(
    "Accuracy",
    "test accuracy, %",
    value=lambda record: record.accuracy,
    plotted=lambda value: 100 * value,
    shown=lambda value: f"{100 * value:.1f} %",
    better=max,
)
PERPLEXITY = Measure(
    "Perplexity",
    "test perplexity (log scale)",
    value=lambda record: record.perplexity,
    plotted=lambda value: value,
    shown=lambda value: f"{value:,.2f}",
    better=min,
    log=True,
)
EXACT_MATCH = Measure(
    "Exact match",
    "exact match of generated answers, %",
    value=lambda record: record.exact_match,
    plotted=lambda value: 100 * value,
    shown=lambda value: f"{100 * value:.1f} %",
    better=max,
)


def measure_of(runs: Sequence[RunRecord]) -> Measure:
    """Perplexity where a run tells it, else accuracy."""
    return PERPLEXITY if any(PERPLEXITY.last(run) is not None for run in runs) else ACCURACY


def further_measures(runs: Sequence[RunRecord]) -> tuple[Measure, ...]:
    """Measures that are told besides the first: exact match, where a run has it."""
    return tuple(m for m in (EXACT_MATCH,) if any(m.last(run) is not None for run in runs))
