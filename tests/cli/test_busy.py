"""The bar of long commands: seen when they take long, on a terminal, and never else."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from dare_agg.cli.busy import busy


def shown(seconds: float, *, terminal: bool = True) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80)
    with busy("measuring", console, patience=0.05):
        time.sleep(seconds)
    return out.getvalue()


def test_a_bar_appears_when_it_takes_long() -> None:
    said = shown(0.6)
    assert "measuring" in said and "0:00:00" in said


def test_nothing_is_shown_of_what_is_quick() -> None:
    assert "measuring" not in shown(0.0)


def test_nothing_is_shown_where_nobody_looks() -> None:
    assert shown(0.3, terminal=False) == ""


def test_an_error_passes_and_ends_the_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(ValueError, match="why"), busy("measuring", console, patience=0.0):
        raise ValueError("why")
