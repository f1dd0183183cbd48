"""A client tells a perplexity and no loss, or a loss of which no perplexity is made."""

from types import SimpleNamespace

import pytest
from flwr.app import MetricRecord, RecordDict

from dare_agg.flower.metrics import weighted_metrics
from dare_agg.runs.report.facts import _cards
from dare_agg.runs.report.measures import PERPLEXITY
from server.app import _row

LISTS = ("update_bytes", "dense_bytes", "clients", "rejected", "download_bytes", "upload_bytes")


@pytest.mark.parametrize(
    "theirs", [{}, {"loss": [2.0]}, {"loss": float("inf")}, {"loss": -1e12}, {"loss": 1e12}]
)
def test_the_row_of_the_round_is_written(theirs):
    """It ended the run with a KeyError, or the report with a division by 0."""
    told = [{"loss": 1.0, "perplexity": 2.7}, {"perplexity": 3.0, **theirs}]
    records = [RecordDict({"m": MetricRecord(one)}) for one in told]
    measured = {key: [] for key in (*LISTS, "delta_max", "share_above")}
    outcome = SimpleNamespace(
        round=1,
        measurements={**measured, "accepted": 2, "seconds": 1.0},
        client_metrics=weighted_metrics(records, [0.5, 0.5], "num-examples"),
        train_metrics=None,
        model=SimpleNamespace(delta=SimpleNamespace(size=9)),
    )
    row = _row("fedavg", outcome, 1.0, stepwise=False)
    assert row.perplexity is None or row.perplexity >= 1


def test_a_report_of_a_perplexity_of_zero():
    def run(name, value):
        record = SimpleNamespace(perplexity=value, accuracy=None)
        return SimpleNamespace(name=name, rounds=[record], upload=0, parameters=9)

    runs = [run("fedavg", 0.0), run("dare", 2.0)]
    assert PERPLEXITY.last(runs[0]) == 0.0
    assert [card["figure"] for card in _cards(runs)] == ["2.00"]
