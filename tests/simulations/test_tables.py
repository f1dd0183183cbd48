"""The figures of the results page: targets, bytes to them, hours over a link."""

from __future__ import annotations

from typing import Any

import pytest

from simulations.pages import frontier, language, links, small, tables


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


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.031, 0.029, 0.03], "+3.0 ± 0.2"),
        ([0.03, -0.01, 0.01], "+1.0 ± 5.0, no finding"),
        # Level within two points: that is a finding.
        ([0.001, -0.001, 0.0], "+0.0 ± 0.2"),
        ([0.03], "+3.0"),
    ],
)
def test_a_difference_whose_interval_covers_zero_is_no_finding(
    values: list[float], said: str
) -> None:
    assert tables.shown(values, signed=True) == said
    assert "no finding" not in tables.shown(values)


def test_losses_are_judged_in_nats() -> None:
    assert language.number([0.002, 0.001, 0.003], signed=True) == "+0.002 ± 0.002"
    assert language.number([0.004, -0.002, 0.0], signed=True) == "+0.001 ± 0.008"
    assert language.number([0.3, -0.2, 0.1], signed=True).endswith(", no finding")


def test_survivors_that_learn_are_paired_with_dare_of_their_rate() -> None:
    def row(cell: str, seed: int, accuracy: float) -> dict[str, Any]:
        return {"cell": cell, "seed": seed, "accuracy": accuracy, "bytes": 232}

    rows = [row("p=.9: DARE", 0, 0.9), row("p=.9: other", 0, 0.8), row("p=.99: other", 0, 0.7)]
    table = small.learned_rounds_table(rows)
    assert "| p=.9: DARE | 232 | 90.0 | – | 1 |" in table
    assert "| p=.9: other | 232 | 80.0 | -10.0 | 1 |" in table
    assert "| p=.99: other | 232 | 70.0 | – | 1 |" in table


def test_keep_rates_of_secure_rounds_are_paired_by_seed() -> None:
    def row(keep: str, seed: int, accuracy: float, error: float, words: int) -> dict[str, Any]:
        found = {"cell": f"x, p=.9, {keep}", "keep_rates": keep, "seed": seed}
        return {**found, "accuracy": accuracy, "errors": [9.0, error], "words": [100, words]}

    rows = [row("uniform", 0, 0.8, 2.0, 100), row("last", 0, 0.81, 1.0, 99)]
    table = small.secure_rates_table([*rows, row("last", 1, 0.5, 1.0, 99)])
    assert "| x, p=.9 | 80.0 | 81.0 | +1.0 | 0.50 | 1.000 | 1 |" in table
