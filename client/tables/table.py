"""What a table of any file becomes: named columns of cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """Names of columns, each column's cells, what each row is called, and remarks."""

    names: Sequence[str]
    column: Callable[[str], Sequence[Any]]
    row: Callable[[int], str] = lambda number: f"row {number + 1}"
    notes: list[str] = field(default_factory=list)
