"""The app with privacy of each party's rows: budgets, rows, card, resume, refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from client.app import app as client_app
from dare_agg.errors import ConfigError, RunError
from server.app import main as run_server
from server.config import DEFAULTS
from simulations.runs.memory_grid import MemoryGrid, pretend_task

HERE = Path(__file__).parent


def _load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


FILES = _load(HERE.parent / "client" / "conftest.py", "record_client_files")
tiny_model, review_files = FILES.tiny_model, FILES.review_files
METHOD = "dare-task-arithmetic"


@pytest.fixture
def run(tiny_model, review_files, tmp_path, monkeypatch):
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))

    def go(into="run", node=None, **changes):
        raw = DEFAULTS | {
            "model": str(tiny_model), "data": str(review_files["csv"]), "text-column": "review",
            "label-column": "tone", "output": str(tmp_path / into), "num-rounds": 2,
            "partition": "iid", "min-clients": 2, "length": 12, "steps": 2, "batch": 8,
            "drop-rate": "0.5", "dp": "records", "dp-epsilon": 4.0, "evaluate": False,
            "save-model": False, "max-empty-rounds": 1,
        }  # fmt: skip
        raw |= {key.replace("_", "-"): value for key, value in changes.items()}
        pretend_task()

        def config(place):
            own = {"partition-id": place, "num-partitions": 2}
            return own | (node(place) if node else {})

        grid = MemoryGrid(client_app, 2, run_config=raw, node_config=config)
        run_server(grid, Context(1, 1, {}, RecordDict(), raw))
        folder = tmp_path / into
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return folder, rows, grid

    return go


def test_each_party_spends_its_budget_and_row_and_card_say_it(run, tmp_path):
    folder, rows, grid = run(save_model=True)
    spent = [row["privacy_epsilon"] for row in rows]
    assert 0 < spent[0] < spent[1] <= 4.0
    assert spent[1] > 3.98
    assert all(row["accepted"] == 2 and row.get("train_loss") is None for row in rows)
    card = (folder / f"model-{METHOD}" / "README.md").read_text(encoding="utf-8")
    assert "a row of a party's training data" in card
    told = json.loads((folder / f"model-{METHOD}" / "provenance.json").read_text())["privacy"]
    assert told["epsilon"] == pytest.approx(spent[1]) and told["epsilon_budget"] == 4.0
    budgets = list((folder / "privacy").glob("*.budget"))
    assert len(budgets) == 2
    # What a reply tells of the training is the budget and how many rows there are.
    told = [next(iter(reply.content.metric_records.values())) for reply in grid.received
            if "train" in reply.metadata.message_type and reply.has_content()]  # fmt: skip
    assert {key for one in told for key in one if not key.startswith("dare")} <= {
        "num-examples", "privacy-epsilon", "privacy-delta", "privacy-noise"
    }  # fmt: skip
    # The noise was that of two rounds: no party's budget bears a third.
    before = [one.read_bytes() for one in budgets]
    with pytest.raises(RunError):
        run(num_rounds=3, resume=True)
    assert [one.read_bytes() for one in budgets] == before


def test_simulated_parties_are_gone_with_their_run(run, tmp_path):
    for _ in range(2):
        folder, rows, _ = run(num_rounds=1)
        assert len(rows) == 1 and rows[0]["accepted"] == 2
        shutil.rmtree(folder)


def test_a_party_keeps_its_own_file_over_all_runs(run, tmp_path):
    def own(place):
        return {"dp-budget": str(tmp_path / f"party-{place}"), "client-name": f"party-{place}"}

    run("one", own)
    with pytest.raises(RunError):
        run("two", own)
    run("three", lambda place: own(place) | {"dp-epsilon": 6.0})
    with pytest.raises(RunError):  # another's file
        run("four", lambda place: own(1 - place) | {"client-name": f"party-{place}"})


def test_a_party_spends_less_than_the_run_asks_where_it_says_so(run, tmp_path):
    _, rows, _ = run(node=lambda place: {"dp-epsilon": 1.0})
    assert 0.98 < rows[-1]["privacy_epsilon"] <= 1.0


def test_a_budget_put_back_to_an_older_day_trains_nothing(run, tmp_path):
    def own(place):
        return {"dp-budget": str(tmp_path / f"party-{place}"), "dp-epsilon": 20.0}

    run("one", own)
    old = {place: (tmp_path / f"party-{place}").read_bytes() for place in (0, 1)}
    run("two", own)
    for place, content in old.items():
        (tmp_path / f"party-{place}").write_bytes(content)
    with pytest.raises(RunError):
        run("three", own)


def test_a_node_with_a_budget_trains_in_no_run_without_privacy(run, tmp_path):
    with pytest.raises(RunError):
        run(node=lambda place: {"dp-budget": str(tmp_path / "b")}, dp="", dp_epsilon=8.0)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"dp_members": 5}, "dp-members"),
        ({"dp_quantile": 0.5}, "dp-quantile"),
        ({"methods": "fedavg,dare-average"}, "one by one"),
        ({"methods": "dare-fisher"}, "statistics"),
        ({"early_stop": 2}, "early-stop"),
        ({"packing": True}, "packing"),
        ({"precision": "float16"}, "float16"),
        ({"dp_epsilon": -1.0}, "above 0"),
        ({"dp_epsilon": 51.0}, "dp-weak"),
        ({"dp_clip": 0.0}, "clip"),
        ({"dp_noise": 0.001}, "noise"),
    ],
)
def test_what_breaks_the_promise_is_refused_before_anyone_is_asked(run, words, said):
    with pytest.raises(ConfigError, match=said):
        run(**words)
