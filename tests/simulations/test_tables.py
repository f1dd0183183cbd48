"""The figures of the results page: targets, bytes to them, hours over a link."""

from __future__ import annotations

from typing import Any

import pytest

from simulations.pages import frontier, links, tables


def _row(cell: str, seed: int, scores: list[float], up: int, down: int) -> dict[str, Any]:
    curve = [
        {
            "round": number,
            "accuracy": score,
            "rows": 100,
            "upload_bytes": number * up,
            "download_bytes": number * down,
        }
        for number, score in enumerate(scores, 1)
    ]
    return {
        "cell": cell,
        "seed": seed,
        "accuracy": scores[-1],
        "curve": curve,
        "rounds": len(scores),
        "clients": 2,
        "parameters": 1000,
        "upload_bytes": len(scores) * up,
        "download_bytes": len(scores) * down,
        "upload_bytes_per_client_round": up // 2,
        "cpu_seconds": 0.0,
    }


DENSE = [_row("FedAvg", s, [0.5, 0.7, 0.8, 0.9, 0.9], 8000, 8000) for s in (0, 1)]
CLOSE = [_row("close", s, [0.5, 0.7, 0.85, 0.9, 0.9], 80, 800) for s in (0, 1)]
FAR = [_row("far", 0, [0.5] * 5, 8, 8)]


def test_bytes_until_the_mean_of_three_rounds_reaches_the_target() -> None:
    targets = frontier.targets_of(DENSE)
    assert targets[0] == pytest.approx(2.6 / 3 - 0.01)
    assert frontier.bytes_to(CLOSE, targets, "upload_bytes") == (400, 2)
    assert frontier.bytes_to(CLOSE, targets, "upload_bytes", "download_bytes") == (4400, 2)
    assert frontier.bytes_to(FAR, targets, "upload_bytes") is None


def test_frontier_table_compares_on_equal_seeds_and_says_what_was_not_reached() -> None:
    lines = frontier.frontier_table([*DENSE, *CLOSE, *FAR]).splitlines()
    close, far = lines[-2], lines[-1]
    assert "+1.7 ± 0.0" in close
    assert "400 B (100×)" in close
    assert far.count("not reached") == 2
    assert far.endswith("| 1 |")


def test_mixtures_show_differences_and_the_baseline_itself() -> None:
    rows = [{**row, "cell": f"IID: {row['cell']}"} for row in (*DENSE[:1], *CLOSE[:1])]
    assert "| close | +1.7 |" in frontier.mixtures_table(rows)
    assert "| FedAvg | 86.7 |" in frontier.mixtures_table(rows)
    assert "| close | 4.4 kB (18×) |" in frontier.mixtures_bytes_table(rows)


def test_hours_over_a_link_are_transfer_and_message_overhead_and_compute() -> None:
    row = {**DENSE[0], "cpu_seconds": 36.0}
    # 8,000 bytes a client and round, 1,600 of the messages, 3.6 s of compute, 4 rounds.
    seconds = 4 * (8 * 9600 / 20_000 + 3.6)
    assert links._hours_to(row, 0.89, 1000, 20) == pytest.approx(seconds / 3600)


def test_the_hard_table_pairs_each_way_with_its_own_tuned_model():
    def row(seed: int, tuned: float, found: float) -> dict[str, Any]:
        points = [
            {"way": "tuned", "accuracy": tuned},
            {"way": "base", "accuracy": 0.5},
            {"way": "own", "bits": 0.1, "accuracy": found},
            {"way": "bitdelta", "bits": 1.0, "accuracy": tuned - 0.02},
        ]
        return {"cell": "x", "seed": seed, "points": points}

    table = tables.hard_table([row(0, 0.9, 0.8), row(1, 0.7, 0.6)])
    assert "| points from tuned | 1 bit a parameter | 0.1 bit a parameter |" in table
    assert "| **x**: tuned 80.0, base 50.0; 2 seeds |" in table
    assert "| own | – | -10.0 ± 0.0 |" in table
    assert "| bitdelta | -2.0 ± 0.0 | – |" in table
