"""The picture that `dare-agg run --dry-run` draws, and what it adds up."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dare_agg.cli.outlook import bar, letters, run_seconds, show_outlook

CLIENTS = [
    {"rows": 90, "held_out": 0, "labels": {"ham": 60, "spam": 30}},
    {"rows": 30, "held_out": 0, "labels": {"ham": 0, "spam": 30}},
]
SETTINGS = {
    "num-rounds": 4, "min-clients": 2, "data": "sms", "model": "minilm", "epochs": 0, "steps": 5,
    "batch": 10, "fraction-train": 1.0, "evaluate": True,
}  # fmt: skip
METHOD = {"name": "dare-ties", "up": 1000, "down": 5000, "down_later": 2000, "says": "trains"}
FOUND = {
    "clients": CLIENTS, "test_rows": 100, "methods": [METHOD], "notes": ["a note"],
    "step_seconds": 2.0, "row_seconds": 0.1, "client_bytes": 2_000_000,
}  # fmt: skip


def test_a_bar_is_a_clients_rows_by_label():
    by = letters(CLIENTS)
    assert by == {"ham": "a", "spam": "b"}
    assert bar(CLIENTS[0], by, 90) == "a" * 32 + "b" * 16
    assert bar(CLIENTS[1], by, 90) == "b" * 16
    assert bar({"rows": 9, "labels": {}}, {}, 90) == "#" * 5


def test_many_labels_share_a_dot():
    many = [{"rows": 60, "labels": {f"l{i:02}": 2 for i in range(30)}}]
    by = letters(many)
    assert by["l00"] == "a" and by["l29"] == "·"
    assert len(bar(many[0], by, 60)) == 48


def shown(found: dict, **settings: object) -> str:
    out = io.StringIO()
    show_outlook(found, SETTINGS | settings, 1, Console(file=out, width=100))
    return out.getvalue()


def test_the_page_has_rows_bytes_and_costs():
    said = shown(FOUND)
    # 2 clients: 4 updates each, the model once and three steps down.
    assert "30.0 kB" in said and "5.0 kB once, then at most 2.0 kB" in said
    assert "120 rows to train on, 100 to test on" in said and "note: a note" in said
    assert "a ham, b spam" in said


def test_a_deployment_has_no_rows_and_no_costs():
    elsewhere = {"methods": [METHOD | {"up": None}]}
    said = shown(elsewhere)
    assert "not looked at" in said and "to train on" not in said


@pytest.mark.parametrize(
    ("parallel", "words", "seconds"),
    [
        (1, {}, 4 * (2 * 5 * 2.0 + 10)),
        (2, {}, 4 * (5 * 2.0 + 5)),
        # Epochs: 9 and 3 steps; side by side the longer one is waited for.
        (2, {"epochs": 1}, 4 * (9 * 2.0 + 5)),
        (1, {"evaluate": False}, 4 * 20.0),
    ],
)
def test_seconds_by_hand(parallel, words, seconds):
    assert run_seconds(FOUND, SETTINGS | words, parallel) == pytest.approx(seconds)
