import pytest

from dare_agg.cli.progress import measured, task_tables
from dare_agg.runs.by_task import by_client_and_task, over_clients, task_cells
from dare_agg.runs.rows import RunRow

TOLD = [
    {"name": "a", "metrics": {"loss": 1.5, "loss:sums": 1.0, "rows:sums": 10, "loss:words": 2.0,
                              "rows:words": 30, "exact-match:sums": 0.5, "accuracy:sums": 0.1}},
    {"name": "b", "metrics": {"loss": 3.0, "loss:sums": 3.0, "rows:sums": 30}},
    {"name": "c", "metrics": {"loss": 3.0}},
]  # fmt: skip


def row(entries):
    return RunRow.of("dare-ties", 3, {"loss": 1.0}, by_task=entries)


def test_metrics_of_tasks_become_a_table_by_client_and_task():
    assert by_client_and_task(TOLD) == [
        {"client": "a", "task": "sums", "loss": 1.0, "rows": 10, "exact-match": 0.5},
        {"client": "a", "task": "words", "loss": 2.0, "rows": 30},
        {"client": "b", "task": "sums", "loss": 3.0, "rows": 30},
    ]
    assert by_client_and_task([TOLD[2]]) == []


def test_means_over_clients_weigh_by_rows_and_leave_out_who_did_not_say():
    sums, words = over_clients(by_client_and_task(TOLD))
    assert sums["rows"] == 40 and sums["loss"] == pytest.approx(2.5)
    assert sums["exact-match"] == 0.5 and "exact-match" not in words


def test_cells_and_tables():
    cells = task_cells(row(by_client_and_task(TOLD)))
    assert cells[0] == ("a", "sums", "10", "1.000", "2.72", "50.0 %")
    assert cells[2] == ("b", "sums", "30", "3.000", "20.09", "–")
    assert [line[:2] for line in cells[3:]] == [("all clients", "sums"), ("all clients", "words")]
    assert len(task_tables([row(by_client_and_task(TOLD)), RunRow.of("fedavg", 1, {})])) == 1
    assert task_cells(row([])) == []


def test_many_clients_are_told_as_means_alone():
    many = [{"client": f"c{n}", "task": "sums", "rows": 1, "loss": float(n)} for n in range(25)]
    assert task_cells(row(many)) == [("all clients", "sums", "25", "12.000", "162,754.79", "–")]


def test_a_row_holds_no_more_than_means_of_very_many():
    crowd = [{"name": f"c{n}", "metrics": {"loss:x": float(n), "rows:x": 2}} for n in range(600)]
    entries = by_client_and_task(crowd)
    assert entries == [{"client": "all clients", "task": "x", "rows": 1200, "loss": 299.5}]
    assert [line[:3] for line in task_cells(row(entries))] == [("all clients", "x", "1200")]


def test_what_another_program_wrote_there_is_shown_as_nothing():
    odd = [{"client": None, "task": 3, "rows": "x", "loss": float("inf"), "exact-match": True}]
    assert task_cells(row(odd))[0] == ("None", "3", "–", "–", "–", "–")


def test_a_language_models_round_is_told_by_perplexity_and_exact_match():
    language = {"accuracy": 0.5, "perplexity": 12.5, "exact-match": 0.25}
    assert measured(RunRow.of("x", 1, language)) == "perplexity 12.50, exact match 0.250"
    assert measured(RunRow.of("x", 1, {"accuracy": 0.5})) == "accuracy 0.500"
