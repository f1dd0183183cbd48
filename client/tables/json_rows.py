"""Tables in JSON: an object a row, a line each or in a list, or a list a column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from client.tables.table import Table
from client.text_files import MOST_BYTES
from dare_agg.errors import ConfigError
from dare_agg.files.json_text import parse_json

MOST_LINE = 1 << 26  # of JSON Lines
# A row of JSON is some ten values, and a row of text rarely below 50 bytes.
_JSON_COST = 1 << 27


def read_json(text: str, what: str, wanted: Sequence[str]) -> Table:
    """The table of a JSON text; raises `ConfigError` where it is none of a known form.

    An object alone is one row where a ``wanted`` column of it is a list of objects, such as the
    messages of a conversation, and may be columns or a list of rows by a name else.
    """
    text = text.strip()
    if not text.startswith("["):
        found = _json_lines(text, what, wanted)
        if found is not None:
            return found
    try:
        whole = parse_json(text, most=MOST_BYTES, cost=_JSON_COST)
    except ValueError as error:
        raise ConfigError(f"{what} cannot be read: {error}") from error
    if isinstance(whole, dict):
        if _is_row(whole, wanted):
            return _objects([whole], what)
        columns = {n: v for n, v in whole.items() if isinstance(v, dict | list)}
        if set(columns) == {"columns", "data"} or set(columns) == {"columns", "index", "data"}:
            names = [str(name) for name in whole["columns"]]
            return _objects([dict(zip(names, row, strict=False)) for row in whole["data"]], what)
        listed = [v for v in whole.values() if isinstance(v, list)]
        if len(listed) == 1 and listed[0] and all(isinstance(v, dict) for v in listed[0]):
            return _objects(listed[0], what)
        if columns and len(columns) == len(whole):
            return _by_column(columns, what)
    elif isinstance(whole, list):
        return _objects(whole, what)
    raise ConfigError(
        f"{what} is no table of a form that is known; write an object a row, one a line (pandas: "
        "to_json(path, orient='records', lines=True))"
    )


def _is_row(value: Mapping[str, Any], wanted: Sequence[str]) -> bool:
    """Whether an object that may be a whole table is one row of it."""
    cells = [value.get(name) for name in wanted]
    return any(
        isinstance(cell, list) and cell and all(isinstance(part, dict) for part in cell)
        for cell in cells
    )


def _json_lines(text: str, what: str, wanted: Sequence[str]) -> Table | None:
    """The table of JSON Lines; None where its only line may be a whole table by itself."""
    # Not splitlines: JSON may hold Unicode's line separators inside a string.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    rows: list[Any] = []
    numbers: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, most=MOST_LINE)
        except ValueError as error:
            if not rows:
                try:  # an object over several lines
                    parse_json(text, most=MOST_BYTES, cost=_JSON_COST)
                except ValueError:
                    pass
                else:
                    return None
            raise ConfigError(f"{what}, line {number}: {error}; mend or remove it") from error
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise ConfigError(f"{what}, line {number}: a {kind}; an object of columns is needed")
        rows.append(value)
        numbers.append(number)
    if len(rows) == 1 and not _is_row(rows[0], wanted):
        cells = rows[0].values()
        if cells and all(isinstance(v, dict | list) for v in cells):
            return None
    return _objects(rows, what, lambda row: f"line {numbers[row]}")


def _objects(
    rows: Sequence[Any], what: str, where: Callable[[int], str] = lambda row: f"row {row + 1}"
) -> Table:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ConfigError(f"{what}, {where(number)}: a {kind}; an object of columns is needed")
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(list(names), lambda name: [row.get(name) for row in rows], where)


def _by_column(columns: Mapping[str, Any], what: str) -> Table:
    lists = {n: list(v.values()) if isinstance(v, dict) else v for n, v in columns.items()}
    if len({len(cells) for cells in lists.values()}) > 1:
        sizes = ", ".join(f"{name}: {len(cells)}" for name, cells in list(lists.items())[:8])
        raise ConfigError(f"{what} has columns of different lengths ({sizes}); mend it")
    return Table(list(lists), lambda name: lists[name])
