"""A run folder of the first layout, left by a dead process: read, reported, gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_app import RUN_CLIENTS, exact_app, run_node
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file

from dare_agg.cli.progress import load_config, load_rows
from dare_agg.cli.run_config import resumed_config
from dare_agg.flower import dare_mod
from dare_agg.runs.report import read_run
from dare_agg.vectors.model import global_model
from server.app import main as run_server
from simulations.runs.memory_grid import MemoryGrid

DATA = Path(__file__).resolve().parents[1] / "data" / "made-by-0.1"
EXPECTED = json.loads((DATA / "runs" / "expected.json").read_text())
METHODS = ("fedavg", "dare-ties")
# What rows tell since then.
YOUNGER = {"drop_rate", "value_format", "noise", "noise_of_change", "by_client"}


def check_rows(found: list[dict[str, Any]], known: list[dict[str, Any]]) -> None:
    """Rows are the known ones but for the time they took; norms may differ in their last bits."""
    for row, wanted in zip(found, known, strict=True):
        assert {*row} - YOUNGER == {*wanted, "seconds", "round_seconds"}
        for key, value in wanted.items():
            assert row[key] == (pytest.approx(value) if isinstance(value, float) else value), key


@pytest.mark.parametrize("lost", [0, 1])
def test_a_run_goes_on_to_the_fingerprints_of_an_undisturbed_one(
    lost: int, old: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without the newest state of each method, from the round before."""
    monkeypatch.chdir(old("runs"))
    folder = Path("run")
    if lost:
        for method in METHODS:
            max((folder / "state" / method).glob("round-*")).unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    raw = {**resumed_config(folder), "output": "run", "resume": True}
    app = exact_app([dare_mod])
    grid = MemoryGrid(app, RUN_CLIENTS, node_config=run_node, run_config=raw)
    run_server(grid, Context(1, 1, {}, RecordDict(), raw))
    state = json.loads((folder / "run.json").read_text())
    assert state["status"] == "completed"
    assert state["fingerprints"] == EXPECTED["fingerprints"]
    rows = [row.values for row in load_rows(folder)]
    assert len(rows) == 8
    for method in METHODS:
        assert [row["round"] for row in rows if row["method"] == method] == [1, 2, 3, 4]
        provenance = json.loads((folder / f"model-{method}" / "provenance.json").read_text())
        assert provenance["final_fingerprint"] == EXPECTED["fingerprints"][method]
    if lost:
        return
    assert (folder / "metrics.jsonl").read_bytes().startswith(before)
    # Byte counts too: the clients' caches spare them what they had.
    check_rows(rows, EXPECTED["rows"])
    for method in METHODS:
        provenance = json.loads((folder / f"model-{method}" / "provenance.json").read_text())
        for way in ("upload_bytes", "download_bytes"):
            due = sum(row[way] for row in EXPECTED["rows"] if row["method"] == method)
            assert provenance[way] == due


def test_the_report_and_progress_read_it(
    old: Callable[[str], Path], call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(old("runs"))
    assert json.loads(call("report", "run", "--json"))["runs"] == EXPECTED["report"]
    assert "Run run" in Path("run/report.html").read_text(encoding="utf-8")
    runs = read_run(Path("run"), histograms=True)
    assert [(one.method, len(one.rounds)) for one in runs] == [("fedavg", 4), ("dare-ties", 2)]
    assert runs[0].histogram is not None and sum(runs[0].histogram[1]) > 400
    assert load_config(Path("run"))["num-rounds"] == 4
    check_rows([row.values for row in load_rows(Path("run"))], EXPECTED["rows"][:6])


def test_an_exported_model_is_the_one_its_provenance_names(old: Callable[[str], Path]) -> None:
    model = old("runs") / "run" / "model-fedavg"
    provenance = json.loads((model / "provenance.json").read_text())
    card = (model / "README.md").read_text(encoding="utf-8")
    for key, value in provenance.items():
        assert key == "config" or f"| {key} | `{json.dumps(value)}` |" in card
    assert json.dumps(provenance["config"], indent=1) in card
    assert provenance["config"] == load_config(model.parent)
    head = load_file(model / "head.safetensors")
    body = load_file(model / "model.safetensors")
    start = load_file(model.parents[1] / "start.safetensors")
    arrays = {
        name: head[name] if name in head else body[name.removeprefix("encoder.")]
        for name in json.loads(_metadata(model.parents[1] / "start.safetensors")["order"])
    }
    assert {a.dtype for a in arrays.values()} == {a.dtype for a in start.values()}
    version = global_model(arrays, dense=provenance["config"]["dense"]).ref.version
    assert version == provenance["final_fingerprint"] == EXPECTED["fingerprints"]["fedavg"]
    began = global_model({n: start[n] for n in arrays}, dense=provenance["config"]["dense"])
    assert began.ref.version == provenance["base_fingerprint"]
    assert any(not np.array_equal(arrays[name], start[name]) for name in arrays)
    for name, array in load_file(model.parents[1] / "base" / "model.safetensors").items():
        assert array.tobytes() == start.get(f"encoder.{name}", start.get(name)).tobytes()


def _metadata(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
    return found
