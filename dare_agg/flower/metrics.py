"""The clients' own metrics as one record: by the app's function, or weighted."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import cast

from flwr.app import MetricRecord, RecordDict

LOG = logging.getLogger("flwr")

MOST_TOLD = 256  # metrics of one client that are kept beside the mean of all
MetricsFn = Callable[[list[RecordDict], str], MetricRecord]


def aggregate_metrics(
    own: MetricsFn, contents: Sequence[RecordDict], weights: Sequence[float], key: str
) -> MetricRecord | None:
    """Aggregate the clients' metrics by the app's function, or by ``weights`` for `mean_metrics`.

    The app's function is given the replies' whole contents, as FedAvg's is. None where it fails;
    what clients put there must not end the run.
    """
    if own is mean_metrics:
        return weighted_metrics(contents, weights, key)
    try:
        return own(list(contents), key)
    except Exception as error:
        LOG.warning("metrics were not aggregated: %s: %s", type(error).__name__, error)
        return None


def told_metrics(content: RecordDict) -> dict[str, float]:
    """A client's metrics that are finite numbers of printable names, `MOST_TOLD` of them."""
    metrics = next(iter(content.metric_records.values()), MetricRecord())
    numbers = {
        str(key): float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value) and _is_name(str(key))
    }
    return dict(list(numbers.items())[:MOST_TOLD])


def _is_name(key: str) -> bool:
    return len(key) <= 128 and key.isprintable()


def mean_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """The mean of the clients' metrics by what each says it weighs, for an app's own code.

    Raises `KeyError` where one does not say it.
    """
    rows = [next(iter(content.metric_records.values())) for content in contents]
    numbers = [float(cast(float, row[weighted_by_key])) for row in rows]
    total = math.fsum(numbers)
    return weighted_metrics(contents, [number / total for number in numbers], weighted_by_key)


def weighted_metrics(
    records: Sequence[RecordDict], weights: Sequence[float], weighted_by_key: str
) -> MetricRecord:
    """Weighted mean of every metric that all records have as a finite number, in their order.

    The weight itself is left out, as Flower's FedAvg does.

    Lists of one length are averaged element by element. Anything else a client may have put
    there is left out; numbers that are not finite are left out with a warning.
    """
    rows = [_metrics(record) for record in records]
    result = MetricRecord()
    wild: list[str] = []
    for key in rows[0] if rows else ():
        if not all(key in row for row in rows):
            continue
        if key == weighted_by_key or not _is_name(key):
            continue
        values = [row[key] for row in rows]
        lists = [value if isinstance(value, list) else [value] for value in values]
        if len({len(value) if isinstance(value, list) else None for value in values}) != 1:
            continue
        if not all(math.isfinite(number) for numbers in lists for number in numbers):
            wild.append(key)
            continue
        means = [
            math.fsum(value * weight for value, weight in zip(column, weights, strict=True))
            for column in zip(*lists, strict=True)
        ]
        result[key] = means if isinstance(values[0], list) else means[0]
    if wild:
        LOG.warning(
            "metrics left out, since not every client's are finite numbers: %s", ", ".join(wild[:9])
        )
    return result


def _metrics(record: RecordDict) -> MetricRecord:
    return next(iter(record.metric_records.values()), MetricRecord())
