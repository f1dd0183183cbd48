"""The paper's two experiments on a tiny model: every sweep and every method really runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from simulations.pages.tables import delta_table, merging_table, single_table
from simulations.run import run_row
from simulations.runs.scenario import Row, read_scenario

ROOT = Path(__file__).parents[2]


def _load(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


FILES = _load(ROOT / "tests" / "client" / "conftest.py", "client_files")
tiny_model, review_files = FILES.tiny_model, FILES.review_files


def _row(name: str, seed: int, **settings: Any) -> Row:
    scenario = read_scenario(ROOT / "simulations" / "scenarios" / f"{name}.toml")
    own = {**next(iter(scenario.cells.values())), **settings}
    return Row(name, scenario.kind, "tiny", seed, own)


@pytest.fixture
def task(
    tiny_model: str, review_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path))
    return {
        "model": str(tiny_model), "data": str(review_files["csv"]), "text_column": "review",
        "label_column": "tone", "steps": 3, "batch": 4, "length": 8,
    }  # fmt: skip


def test_every_sweep_of_the_single_scenario(task: dict[str, Any]) -> None:
    rows = [
        run_row(_row("single", 0, task=task, drop_rates=["0.5", "0.9"])),
        run_row(_row("single", 1, task=task, drop_rates=["0.5"], wrong_base={**task, "steps": 9})),
    ]
    sweeps = {point["sweep"] for point in rows[0]["points"]}
    assert sweeps == {
        "tuned", "base", "dare", "drop-only", "magnitude", "magnitude-rescaled", "weights"
    }  # fmt: skip
    # Against a wrong base the delta is another one.
    assert rows[0]["delta"] != rows[1]["delta"]
    assert "magnitude-rescaled" in single_table(rows) and "tiny" in delta_table(rows)


def test_every_method_of_the_merging_scenario(task: dict[str, Any]) -> None:
    data = task.pop("data")
    row = run_row(
        _row(
            "merging", 0, tasks={"tone": data, "again": data}, sets=[["tone", "again"]],
            task=task, test_rows=8, statistics_examples=2,
        )
    )  # fmt: skip
    methods = {(point["method"], point["drop_rate"]) for point in row["points"]}
    wanted = {spec["method"] for spec in _row("merging", 0).settings["methods"]}
    assert methods == {(method, rate) for method in wanted for rate in ("0", "0.9")}
    assert "each task's own model" in merging_table([row])
