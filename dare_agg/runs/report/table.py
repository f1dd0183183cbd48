"""The table of runs that reports, comparisons and the terminal show."""

from __future__ import annotations

from collections.abc import Sequence

from dare_agg.runs.report.measures import PERPLEXITY, Measure, further_measures, measure_of
from dare_agg.runs.report.records import RunRecord
from dare_agg.runs.rows import sent_words
from dare_agg.runs.words import human_bytes, smaller_by

_BYTES = ("Upload / client / round", "Smaller by")
_HEAD = "Dense head, extra"
_SENT = "Sent, last round"
_REST = ("Download / client / round", "Seconds")


def table_columns(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """The columns of a table of runs, the method's name first."""
    measures = (measure_of(runs), *further_measures(runs))
    head = () if measures[0] is PERPLEXITY else (_HEAD,)
    sent = (_SENT,) if any(map(_sent, runs)) else ()
    return ("Method", *(measure.title for measure in measures), *sent, *_BYTES, *head, *_REST)


def _sent(run: RunRecord) -> str:
    return sent_words(run.rows[-1]) if run.rows else ""


def table_row(run: RunRecord, runs: Sequence[RunRecord] = ()) -> list[str]:
    """The cells of a run under `table_columns` of all runs, without its name."""
    runs = runs or (run,)
    measures = (measure_of(runs), *further_measures(runs))
    head = human_bytes(run.head_upload) if run.head_upload else "–"
    return [
        *(_shown_last(measure, run) for measure in measures),
        *([_sent(run) or "–"] if any(map(_sent, runs)) else []),
        human_bytes(run.upload) if run.upload else "–",
        smaller_by(4 * run.parameters, run.upload),
        *([] if measures[0] is PERPLEXITY else [head]),
        human_bytes(run.download),
        f"{run.seconds:.0f}",
    ]


def _shown_last(measure: Measure, run: RunRecord) -> str:
    value = measure.last(run)
    return "–" if value is None else measure.shown(value)


TABLE_NOTE = (
    "Upload is the encoded update of the fine-tuned encoder, as it travels. The small dense head "
    "is averaged with every value and counted in its own column. “Smaller by” compares with the "
    "encoder's parameters in float32. “Head only” never changes the encoder: what lies above that "
    "row is what the compact updates achieved."
)


LANGUAGE_NOTE = (
    "Upload is the encoded update as it travels. “Smaller by” compares with the trained parameters "
    "in float32. Perplexity is that of the answers alone, e to the mean loss a token of the test "
    "rows; exact match is that of greedily generated answers."
)
