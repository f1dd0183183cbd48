"""The whole app with secure sums: training on real text, and a merge of tuned models."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file, save_file

from client.app import app as client_app
from dare_agg.secure import identity as identities
from dare_agg.secure.practice import practice_consortium
from server.app import main as run_server
from server.config import DEFAULTS
from simulations.runs.memory_grid import pretend_task

HERE = Path(__file__).resolve().parent


def _load(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


GRID = _load(HERE.parent / "flower" / "conftest.py", "secure_flower_grid").MemoryGrid
FILES = _load(HERE.parent / "client" / "conftest.py", "secure_client_files")
tiny_model, review_files = FILES.tiny_model, FILES.review_files


@pytest.fixture
def run(tiny_model: Path, review_files: Any, tmp_path: Path, monkeypatch: Any) -> Any:
    pretend_task()
    monkeypatch.setattr(identities, "_SCRYPT_N", 1 << 4)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path))

    def go(models: list[str], **changes: Any) -> tuple[Path, list[dict], dict]:
        for key, value in practice_consortium(tmp_path / "run" / "keys", 4, models).items():
            monkeypatch.setenv(key, value)
        raw = DEFAULTS | {
            "model": str(tiny_model),
            "data": str(review_files["csv"]),
            "text-column": "review",
            "label-column": "tone",
            "output": str(tmp_path / "run"),
            "partition": "iid",
            "min-clients": 4,
            "length": 12,
            "steps": 10,
            "learning-rate": 1e-3,
            "head-learning-rate": 1e-2,
            "secure-roster": str(tmp_path / "run" / "keys" / "roster.json"),
            "secure-stage-seconds": 60.0,
            **changes,
        }
        raw = {k: ",".join(v) if isinstance(v, tuple) else v for k, v in raw.items()}
        run_server(GRID(client_app, 4, run_config=raw), Context(1, 1, {}, RecordDict(), raw))
        folder = tmp_path / "run"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return folder, rows, json.loads((folder / "run.json").read_text())

    return go


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "downlink"), [("mean", "auto"), ("ties", "full"), ("wudi", "full")]
)
def test_secure_training_learns(run: Any, method: str, downlink: str) -> None:
    changes = {"secure": method, "drop-rate": "0.5", "num-rounds": 4, "secure-clip": 0.2}
    changes["downlink"] = downlink
    folder, rows, status = run([], **changes)
    assert status["status"] == "completed"
    assert [row["accepted"] for row in rows] == [4] * 4
    assert all(row["method"] == f"secure-{method}" and not row["rejected"] for row in rows)
    assert rows[-1]["accuracy"] > 0.8
    assert (rows[-1].get("secure_lone_share") is None) == (method != "ties")
    down = [row["download_bytes_per_client"] for row in rows]
    # Parties make the public base themselves: no model travels, only steps.
    assert (max(down) < rows[0]["parameters"]) == (downlink == "auto")
    assert (folder / f"model-secure-{method}" / "model.safetensors").is_file()


@pytest.mark.slow
def test_parties_of_a_sum_keep_their_rows_private_too(run: Any, tmp_path: Path) -> None:
    words = {"dp": "records", "dp-epsilon": 4.0, "steps": 2, "batch": 8, "num-rounds": 2}
    folder, rows, status = run([], secure="mean", **{"drop-rate": "0.5", **words})
    assert status["status"] == "completed"
    assert [row["accepted"] for row in rows] == [4] * 2
    # Each party's budget was charged for both rounds; the server is told of none.
    budgets = list(tmp_path.rglob("*.budget"))
    assert len(budgets) == 4
    assert "privacy_epsilon" not in rows[-1]
    card = (folder / "model-secure-mean" / "README.md").read_text(encoding="utf-8")
    assert '"epsilon_budget": 4.0' in card


def test_no_sum_of_a_private_run_lacks_noise(run: Any, tmp_path: Path) -> None:
    words = {"dp": "clients", "dp-epsilon": 4.0, "steps": 1, "num-rounds": 2, "evaluate": False}
    words |= {"weighting": "equal", "drop-rate": "0.5", "learning-rate": 1e-9, "dp-clip": 1.0}
    folder, rows, status = run([], secure="mean", **words)
    assert status["status"] == "completed"
    assert [row["accepted"] for row in rows] == [4] * 2
    # Hardly anything was learnt (the head alone), and the model moves by noise.
    noise = rows[0]["privacy_noise"] * np.sqrt(4 / 3) / 4  # three must stay, four did
    assert rows[0]["merged_norm"] == pytest.approx(
        noise * np.sqrt(0.5 * rows[0]["parameters"]), rel=0.1
    )
    assert 3.9 < rows[-1]["privacy_epsilon"] <= 4.0 and rows[-1]["privacy_delta"] < 0.25
    told = {"train_loss", "loss", "accuracy", "secure_clipped_share", "by_client", "delta_max"}
    assert not {key for row in rows for key in told & row.keys() if row[key] is not None}
    # The run's own budget, and each party's.
    found = sorted(path.name for path in tmp_path.rglob("*.budget"))
    assert found == [*(f"party-{n}.budget" for n in range(4)), "privacy.budget"]
    card = (folder / "model-secure-mean" / "README.md").read_text(encoding="utf-8")
    assert '"epsilon_budget": 4.0' in card and "its noise alone" in card


def test_a_merge_of_tuned_models(run: Any, tiny_model: Path, tmp_path: Path) -> None:
    base = load_file(tiny_model / "model.safetensors")
    rng = np.random.default_rng(0)
    models, deltas = [], []
    for number in range(4):
        delta = {n: rng.normal(0, 1e-3, a.shape).astype(a.dtype) for n, a in base.items()}
        own = {f"bert.{n}": a + delta[n] for n, a in base.items()}
        save_file({**own, "classifier.weight": np.ones((2, number + 1))}, tmp_path / f"m{number}")
        path = tmp_path / f"m{number}.safetensors"
        (tmp_path / f"m{number}").rename(path)
        models.append(str(path))
        deltas.append(delta)
    changes = {"secure": "task-arithmetic", "secure-merge": True, "drop-rate": "0", "scaling": 0.5}
    folder, rows, status = run(models, **changes)
    found = json.loads((folder / "secure.json").read_text())
    assert status["fingerprints"] == {"secure-task-arithmetic": found["fingerprint"]}
    assert len(found["result_at"]) == 4 and rows[0]["accepted"] == 4
    merged = load_file(folder / "merged" / "model.safetensors")
    for name, array in base.items():
        want = array + 0.5 * sum(d[name] for d in deltas)
        assert np.abs(merged[name] - want).max() < 1e-5
    assert (folder / "merged" / "config.json").is_file()
    for number in range(4):
        mine = load_file(folder / "parties" / f"party-{number}.merged.safetensors")
        assert mine["classifier.weight"].shape == (2, number + 1)
        name = next(iter(base))
        assert np.array_equal(mine[f"bert.{name}"], merged[name])
