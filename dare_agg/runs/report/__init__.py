"""The HTML report of runs: `read_run` reads a run's folder, `write_report` writes the page."""

from dare_agg.runs.report.diagnosis import write_diagnosis
from dare_agg.runs.report.page import write_report
from dare_agg.runs.report.records import (
    TITLES,
    RoundRecord,
    RunRecord,
    histogram_of,
    read_run,
)
from dare_agg.runs.report.table import table_columns, table_row

__all__ = [
    "TITLES",
    "RoundRecord",
    "RunRecord",
    "histogram_of",
    "read_run",
    "table_columns",
    "table_row",
    "write_diagnosis",
    "write_report",
]
