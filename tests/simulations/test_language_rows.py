"""Rows of language models run on a tiny one: federated, one model's sweeps, adapters."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dare_agg.codec.update_header import HEADER_BYTES
from simulations.pages import language
from simulations.run import run_row, run_scenario
from simulations.runs.adapters import own_start, products
from simulations.runs.rows import read_rows
from simulations.runs.scenario import KINDS, Row

_SPEC = importlib.util.spec_from_file_location(
    "client_files", Path(__file__).parents[1] / "client" / "conftest.py"
)
assert _SPEC and _SPEC.loader
FILES = importlib.util.module_from_spec(_SPEC)
sys.modules["client_files"] = FILES
_SPEC.loader.exec_module(FILES)
tiny_language_model, review_files = FILES.tiny_language_model, FILES.review_files
chat_model, talk_file = FILES.chat_model, FILES.talk_file


@pytest.fixture
def row(tiny_language_model, review_files):
    def make(kind: str, **settings: Any) -> Row:
        task = {
            "task": "causal-lm",
            "model": str(tiny_language_model),
            "data": str(review_files["csv"]),
            "text_column": "review",
            "label_column": "tone",
            "partition_by": "author",
            "length": 16,
            "steps": 6,
            "batch": 8,
            "learning_rate": 1e-2,
            **settings.pop("task", {}),
        }
        known = KINDS[kind][1]
        return Row("test", kind, "cell", 0, {**known, **settings, "task": task})

    return make


def test_a_federated_row_has_no_head_and_learns_beyond_the_untouched_base(row):
    words = {"rounds": 2, "clients": 3, "partition": "column", "evaluate_every": 1}
    base = run_row(row("federated", method="untouched", **words))
    tuned = run_row(row("federated", method="dare", drop_rate="0.5", **words))
    assert base["upload_bytes"] == base["rounds"] == 0 and base["curve"][-1]["round"] == 0
    assert tuned["curve"][-1]["loss"] < base["curve"][-1]["loss"]
    assert tuned["head_upload_bytes"] == 0 < tuned["upload_bytes"]
    table = language.federated_loss_table(
        [{**base, "cell": "untouched base"}, {**tuned, "cell": "full, FedAvg"}]
    )
    assert f"| {tuned['curve'][-1]['loss']:.3f} |" in table


def test_rows_of_instruction_data_carry_exact_match(row, chat_model, talk_file):
    task = {
        "task": "auto", "model": str(chat_model), "data": str(talk_file), "label_column": "kind",
        "length": 96, "partition_by": "by", "generate_rows": 2, "generate_tokens": 3,
    }  # fmt: skip
    words = {"rounds": 1, "clients": 2, "partition": "column", "drop_rate": "0.5", "task": task}
    found = run_row(row("federated", method="dare", **words))
    assert found["curve"][-1]["exact_match"] == 0.0 < found["curve"][-1]["loss"]
    plain = run_row(row("federated", method="untouched", rounds=1, clients=2))
    assert "exact_match" not in plain["curve"][-1]


def test_single_rows_carry_the_loss(row, tmp_path, monkeypatch):
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path))
    found = run_row(row("single", sweeps=["dare", "weights"], drop_rates=["0.5", "0.9"]))
    tuned, base = found["points"][:2]
    assert tuned["loss"] < base["loss"]
    assert sum(found["delta"]["log10_shares"]) == pytest.approx(
        1 - found["delta"]["exact_zeros"], abs=1e-3
    )
    table = language.loss_table([found])
    assert table.count("\n") == 4 and f"{base['loss'] - tuned['loss']:+.3f}" in table
    assert "100.0" not in language.sizes_table([found], [])
    for draw in (language.loss_plot, language.delta_plot):
        assert draw([found], tmp_path / "plot.svg").stat().st_size > 5000


@pytest.mark.parametrize("own", [False, True])
def test_averaged_products_are_exact_and_averaged_factors_are_not(row, own):
    found = run_row(
        row(
            "adapters",
            clients=3,
            own_start=own,
            ways={"product": ["0", "0.5"], "factors": ["0", "0.5"]},
            task={"lora_rank": 2, "steps": 20},
        )
    )
    points = {(p["way"], p["drop_rate"]): p for p in found["points"]}
    assert language.adapters_table([found]).count("\n") == 1 + len(points)
    assert points["product", "0"]["nmse"] < 1e-10 < points["factors", "0"]["nmse"]
    assert points["product", "0.5"]["nmse"] > 0.01
    assert points["product", "0"]["bytes"] == HEADER_BYTES + 4 * found["product_parameters"]
    assert points["factors", "0"]["bytes"] == HEADER_BYTES + 4 * found["factor_parameters"]
    assert points["product", "0"]["loss"] < points["untouched base", "1"]["loss"]
    if own:  # with a start of each client's own, averaged factors mean almost nothing
        assert points["factors", "0"]["nmse"] > 0.3


def test_products_are_scaled_and_named_as_in_the_plain_model():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5)), rng.standard_normal((4, 2))
    name = "base_model.model.layer.q_proj.lora_{}.default.weight"
    state = {name.format("A"): a, name.format("B"): b}
    found = products(state, 2.0)
    assert np.allclose(found["layer.q_proj.weight"], 2 * b @ a, atol=1e-5)
    moved = own_start(state, 0, 1)
    assert np.array_equal(moved[name.format("B")], b)
    assert not np.array_equal(moved[name.format("A")], a)


def test_the_scenario_takes_any_causal_language_model(tiny_language_model, review_files, tmp_path):
    path = Path(__file__).parents[2] / "simulations" / "scenarios" / "lm.toml"
    changes = {
        "model": str(tiny_language_model), "data": str(review_files["csv"]), "steps": 1,
        "text_column": "review", "partition_by": "author",
    }  # fmt: skip
    out = tmp_path / "rows.jsonl"
    assert run_scenario(path, out, 1, 3, "", changes) == 0
    names = [row["cell"] for row in read_rows(out)]
    assert names == ["untouched base", "LoRA, FedAvg", "LoRA, DARE p=.9"]
