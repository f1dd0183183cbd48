"""A table that is wider than the terminal is turned, and nothing of it is cut."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from dare_agg.cli.output import fitted


def shown(width: int) -> str:
    table = Table(title="After the last round")
    for index, name in enumerate(("method", "accuracy", "update up", "download", "seconds")):
        table.add_column(name, justify="right" if index else "left")
    table.add_row("dare-task-arithmetic", "0.917", "293.0 kB", "90.9 MB", "29")
    table.add_row("fedavg", "0.920", "90.9 MB", "90.9 MB", "31")
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    console.print(fitted(table, console))
    return stream.getvalue()


def test_a_wide_terminal_has_a_row_a_method() -> None:
    said = shown(120)
    (line,) = (line for line in said.splitlines() if "dare-task-arithmetic" in line)
    assert "0.917" in line and "90.9 MB" in line


def test_a_narrow_one_has_a_column_a_method_with_all_words_whole() -> None:
    said = shown(56)
    for word in ("dare-task-arithmetic", "accuracy", "update up", "download", "293.0 kB"):
        assert word in said
    assert "…" not in said
    (line,) = (line for line in said.splitlines() if "update up" in line)
    assert line.index("293.0 kB") < line.index("90.9 MB")
    assert all(len(line) <= 56 for line in said.splitlines())
