"""Has runs look for replies often, and says which Flower the tests of the wire to it ran on."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# scripts/flower_matrix.sh runs the fast ones of these on the oldest supported Flower too.
FLOWER_TESTS = (
    "tests/attacks/malicious_client/",
    "tests/flower/",
    "tests/server/test_asking.py",
    "tests/rounds/test_flower_steps.py",
    "tests/deploy/test_packages.py",
)


def pytest_collection_finish() -> None:
    """Runs look for replies after a millisecond, not 50: a grid in memory has them at once."""
    if exchange := sys.modules.get("dare_agg.flower.exchange"):
        exchange.POLL_SECONDS = 0.001


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for CI: on which Flower, how many passed."""
    ran = [
        (outcome, "slow" in getattr(report, "keywords", ()))
        for outcome in ("passed", "failed", "error", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
        if report.nodeid.startswith(FLOWER_TESTS) and (outcome != "passed" or report.when == "call")
    ]
    if not ran:
        return
    try:
        found = version("flwr")
    except PackageNotFoundError:
        return
    counts = []
    for speed, slow in (("fast", False), ("slow", True)):
        outcomes = [outcome for outcome, is_slow in ran if is_slow == slow]
        words = [f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes)]
        if words:
            counts.append(f"{' and '.join(words)} of the {speed} tests")
    terminalreporter.write_line(f"Flower {found}: {', '.join(counts)} of the wire to Flower")
