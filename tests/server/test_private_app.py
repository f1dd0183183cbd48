"""The app with privacy of its clients: rows, budget, card, resume."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from client.app import app as client_app
from dare_agg.errors import ConfigError, PrivacyError
from server.app import main as run_server
from server.config import DEFAULTS
from server.privacy import BUDGET_FILE
from simulations.runs.memory_grid import MemoryGrid, pretend_task

HERE = Path(__file__).parent


def _load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


FILES = _load(HERE.parent / "client" / "conftest.py", "private_client_files")
tiny_model, review_files = FILES.tiny_model, FILES.review_files
METHOD = "dare-task-arithmetic"


@pytest.fixture
def run(tiny_model, review_files, tmp_path):
    def go(into="run", **changes):
        raw = DEFAULTS | {
            "model": str(tiny_model), "data": str(review_files["csv"]), "text-column": "review",
            "label-column": "tone", "output": str(tmp_path / into), "num-rounds": 3,
            "partition": "iid", "min-clients": 3, "length": 12, "steps": 2, "drop-rate": "0.5",
            "dp": "clients", "dp-members": 50, "dp-epsilon": 6.0, "weighting": "equal",
            "fraction-train": 0.5, "evaluate": False, "save-model": False,
        }  # fmt: skip
        raw |= {key.replace("_", "-"): value for key, value in changes.items()}
        pretend_task()
        run_server(MemoryGrid(client_app, 3, run_config=raw), Context(1, 1, {}, RecordDict(), raw))
        folder = tmp_path / into
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return folder, rows, json.loads((folder / "run.json").read_text())

    return go


def test_rows_and_card_say_what_is_spent_and_a_resumed_run_goes_on_with_it(run):
    folder, rows, state = run(num_rounds=2, save_model=True)
    assert [row["round"] for row in rows] == [1, 2]  # rounds of nobody too
    spent = [row["privacy_epsilon"] for row in rows]
    assert 0 < spent[0] < spent[1] <= 6.0
    card = (folder / f"model-{METHOD}" / "README.md").read_text(encoding="utf-8")
    assert '"neighbours": "add or remove one client"' in card
    assert json.loads((folder / f"model-{METHOD}" / "provenance.json").read_text())["privacy"][
        "epsilon"
    ] == pytest.approx(spent[1])
    budget = folder / "state" / METHOD / BUDGET_FILE
    assert state["status"] == "completed" and budget.is_file()
    # The noise was that of two rounds: the budget bears no third.
    with pytest.raises(PrivacyError, match="more than ε = 6"):
        run(num_rounds=3, resume=True)
    with pytest.raises(ConfigError, match="dp-epsilon"):
        run(num_rounds=3, resume=True, dp_epsilon=20.0)


def test_clients_who_come_apart_are_said_so_and_a_resumed_run_keeps_them_apart(run):
    words = {"dp_apart": 2, "dp_members": 3, "fraction_train": 0.4}
    folder, rows, _ = run(num_rounds=2, save_model=True, **words)
    spent = [row["privacy_epsilon"] for row in rows]
    assert 0 < spent[0] == spent[1] <= 6.0  # nobody can have come twice
    assert [row["accepted"] for row in rows] == [1, 1]
    card = (folder / f"model-{METHOD}" / "README.md").read_text(encoding="utf-8")
    assert "a client takes part once in 2 rounds at most" in card
    assert '"neighbours": "a client\'s data, or nothing in its place"' in card
    with pytest.raises((ConfigError, PrivacyError), match=r"dp-apart|distance of 2"):
        run(num_rounds=3, resume=True, **{**words, "dp_apart": 1})
    with pytest.raises(PrivacyError, match="more than ε = 6"):
        run(num_rounds=3, resume=True, **words)
