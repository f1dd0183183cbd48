"""Clients tell counts and metrics of tasks that have no mean, or tasks without end."""

import json
import time

import pytest

from dare_agg.errors import StateError
from dare_agg.runs.answers import ANSWERS_FILE, read_answers
from dare_agg.runs.by_task import by_client_and_task, over_clients, task_cells
from dare_agg.runs.rows import RunRow

HUGE = 1.7e308


def crowd(clients, tasks, **metrics):
    """What so many clients tell of so many tasks of their own each."""
    told = {f"{name}:t{{}}": value for name, value in metrics.items()}
    return [
        {
            "name": f"c{client}",
            "metrics": {
                key.format(client * tasks + task): value
                for task in range(tasks)
                for key, value in told.items()
            },
        }
        for client in range(clients)
    ]


@pytest.mark.parametrize(
    "told",
    [
        [(3, 1.0), (-13, 1.0)], [(HUGE, 1.0), (HUGE, 2.0)], [(1e300, 1e300), (1e300, -1e300)],
        [(2, HUGE), (2, -HUGE)], [(10**400, 1.0), (1, 10**400)],
    ],
)  # fmt: skip
def test_counts_and_values_without_a_mean(told):
    """One of them ended the run, or the report of it."""
    entries = [
        {"client": f"c{n}", "task": "sums", "rows": rows, "loss": loss}
        for n, (rows, loss) in enumerate([*told, (10, 2.0)])
    ]
    (mean,) = over_clients(entries)
    assert mean["rows"] >= 10 and -1e100 < mean["loss"] < 1e100
    assert len(task_cells(RunRow.of("dare", 1, {}, by_task=entries))) == len(entries) + 1


def test_tasks_without_end():
    """256 metrics of each client, all of tasks of its own: the server took their square."""
    began = time.process_time()
    entries = by_client_and_task(crowd(200, 256, loss=1.0))
    assert len(entries) <= 512 and time.process_time() - began < 5


@pytest.mark.parametrize(("key", "word"), [("rows", "1e999"), ("loss", "1" + "0" * 400)])
def test_answers_of_another_hand(tmp_path, key, word):
    model = {"name": "m", "loss": 1.0, "answers": [], "right": []}
    section = {"data": "d", "questions": [], "wanted": [], "models": [model], "rows": 1}
    (model if key == "loss" else section)[key] = "WORD"
    text = json.dumps({"sections": [section]}).replace('"WORD"', word)
    (tmp_path / ANSWERS_FILE).write_text(text)
    with pytest.raises(StateError, match="holds no answers"):
        read_answers(tmp_path)
