"""Scenario files are checked, rows are keyed and resumed, results survive a cut-off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dare_agg.errors import ConfigError
from simulations import run as runner
from simulations.runs.channels import make_channel
from simulations.runs.scenario import KINDS, read_scenario

SCENARIOS = Path(__file__).parents[2] / "simulations" / "scenarios"
SMALL = """
name = "small"
seeds = [0, 1]
[defaults]
rounds = 2
[[cells]]
name = "a"
[[cells]]
name = "b"
method = "dare"
"""


def _scenario(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda p: p.stem)
def test_committed_scenarios_are_valid(path: Path) -> None:
    assert list(read_scenario(path).rows())


def test_rows_come_seed_by_seed_with_keys_of_their_own(tmp_path: Path) -> None:
    rows = list(read_scenario(_scenario(tmp_path, SMALL)).rows())
    assert [(r.seed, r.cell) for r in rows] == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    assert len({r.key for r in rows}) == 4


def test_a_cell_may_have_fewer_seeds(tmp_path: Path) -> None:
    rows = list(read_scenario(_scenario(tmp_path, SMALL + "seeds = [1]\n")).rows())
    assert [(r.seed, r.cell) for r in rows] == [(0, "a"), (1, "a"), (1, "b")]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("seeds = [2]\n", r"seeds \[2\]; choose from \[0, 1\]"),
        ("dropp_rate = 1\n", "did you mean 'drop_rate'"),
        ("[[cells]]\nname = 'a'\n", "a name of its own"),
    ],
)
def test_wrong_scenarios_are_refused(tmp_path: Path, wrong: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_scenario(_scenario(tmp_path, SMALL + wrong))


def test_runner_skips_rows_that_are_there_and_reports_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, int]] = []

    def fake(row: Any) -> dict[str, Any]:
        ran.append((row.cell, row.seed))
        if (row.cell, row.seed) == ("b", 1):
            raise ValueError("broken")
        return {"scenario": row.scenario, "cell": row.cell, "seed": row.seed, "key": row.key}

    monkeypatch.setattr(runner, "run_row", fake)
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "none")
    path, out = _scenario(tmp_path, SMALL), tmp_path / "out.jsonl"
    assert runner.run_scenario(path, out, 1, 1, "") == 0
    out.write_bytes(out.read_bytes() + b'{"cut of')
    assert runner.run_scenario(path, out, 1, 0, "") == 1
    assert ran == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [(r["cell"], r["seed"]) for r in runner.read_rows(out)] == [
        ("a", 0),
        ("b", 0),
        ("a", 1),
    ]


def _round(method: str, **settings: Any) -> tuple[np.ndarray, Any]:
    rng = np.random.default_rng(0)
    base = {
        "encoder.w": rng.standard_normal((40, 50)).astype(np.float32),
        "head.weight": np.zeros((2, 3), np.float32),
    }
    cell = {**KINDS["federated"][1], "method": method, **settings}
    channel = make_channel(cell, base, 0, 4)
    channel.begin(1, [0, 1, 2, 3])
    sent = None
    for client in range(4):
        tuned = {
            name: array + np.float32(0.01 * (client + 1)) for name, array in channel.state().items()
        }
        sent = channel.send(client, tuned, float(client + 1))
    channel.finish()
    moved = channel.state()
    assert np.allclose(moved["head.weight"], 0.03, atol=1e-4)
    return np.asarray(moved["encoder.w"]) - base["encoder.w"], sent


def test_fedavg_is_the_weighted_mean_and_counts_dense_bytes() -> None:
    step, sent = _round("fedavg")
    assert np.allclose(step, 0.03, atol=1e-6)
    assert (sent.delta, sent.dense) == (8000, 24)


@pytest.mark.parametrize("masks", ["rotated", "independent", "shared"])
def test_dare_channel_is_right_on_average(masks: str) -> None:
    step, sent = _round("dare", drop_rate="0.5", values="f32", masks=masks, merge="ties")
    assert abs(step.mean() - 0.03) < 0.004
    assert sent.delta < 8000 / 2 + 200


def test_feedback_keeps_what_was_not_sent() -> None:
    step, _ = _round("dare", drop_rate="0.5", values="f32", feedback=True)
    assert abs(step.mean() - 0.015) < 0.003
