"""Tables in files: CSV and its kin, JSON, Parquet; named columns of cells."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.missing_columns import no_column
from client.text_files import MOST_BYTES, kind_of, read_text
from dare_agg.errors import ConfigError
from dare_agg.files.json_text import parse_json

MOST_FIELD = 1 << 24
MOST_LINE = 1 << 26  # of JSON Lines
# A row of JSON is some ten values, and a row of text rarely below 50 bytes.
_JSON_COST = 1 << 27

csv.field_size_limit(MOST_FIELD)

_DELIMITED = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_JSON = (".json", ".jsonl", ".ndjson")
SUFFIXES = (*_DELIMITED, *_JSON, ".parquet")
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|", "\\t": "\t"}
_GUESSED = (",", ";", "\t", "|")


@dataclass(frozen=True)
class Table:
    """Names of columns, each column's cells, what each row is called, and remarks."""

    names: Sequence[str]
    column: Callable[[str], Sequence[Any]]
    row: Callable[[int], str] = lambda number: f"row {number + 1}"
    notes: list[str] = field(default_factory=list)


def read_table(
    path: Path,
    wanted: Sequence[str],
    *,
    delimiter: str = "",
    encoding: str = "",
    words: Mapping[str, str] | None = None,
) -> Table:
    """Read a file's table; the ``wanted`` columns tell by which delimiter, where none is told.

    ``words`` are the run config's keys that name the columns, for what is said of a missing one.

    Raises `ConfigError` for a file that cannot be read as what it is named, with the line.
    """
    what = f"data file {str(path)!r}"
    kind = kind_of(path)
    if kind == ".parquet":
        return _parquet(path, what)
    text, notes = read_text(path, encoding)
    if kind in _JSON:
        table = _json(text, what)
    else:
        usual = _DELIMITED.get(kind, ",")
        table = _delimited(text, what, wanted, _delimiter(delimiter), usual, words or {})
    return Table(table.names, table.column, table.row, [*notes, *table.notes])


# --- delimited -------------------------------------------------------------------------------


def _delimiter(told: str) -> str:
    found = DELIMITERS.get(told, told)
    if len(found) > 1 or found in ('"', "\r", "\n"):
        raise ConfigError(
            f"delimiter {told!r}; one character is needed, or one of {', '.join(DELIMITERS)}"
        )
    return found


def _delimited(
    text: str,
    what: str,
    wanted: Sequence[str],
    told: str,
    usual: str,
    words: Mapping[str, str],
) -> Table:
    notes: list[str] = []
    first = text.lstrip("\r\n").split("\n", 1)[0].rstrip("\r")
    skipped = 0
    if len(first) == 5 and first.lower().startswith("sep="):  # what Excel writes and reads
        told, skipped = told or first[4], 1
        text = text.lstrip("\r\n").partition("\n")[2]
    tried = (told,) if told else (usual, *(one for one in _GUESSED if one != usual))
    heads = {one: _header(text, one) for one in tried}
    fitting = [one for one, names in heads.items() if set(wanted) <= set(names)]
    if not fitting:
        raise ConfigError(_unfitting(what, wanted, heads, tried[0], bool(told), words))
    chosen = fitting[0]
    if chosen != tried[0]:
        notes.append(f"{what} was read with the delimiter {chosen!r}, which its first row fits")
    names = heads[chosen]
    for name in wanted:
        if names.count(name) > 1:
            raise ConfigError(
                f"{what} has {names.count(name)} columns {name!r}; rename all but one"
            )
    rows, lines, note = _rows(text, what, chosen, len(names))
    notes += [f"{what}: {note}"] if note else []

    def column(name: str) -> list[str]:
        at = names.index(name)
        return [row[at] if at < len(row) else "" for row in rows]

    return Table(names, column, lambda number: f"line {lines[number] + skipped}", notes)


def _header(text: str, delimiter: str) -> list[str]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return [name.strip() for name in next((row for row in reader if row), [])]
    except csv.Error:
        return []


def _unfitting(
    what: str,
    wanted: Sequence[str],
    heads: Mapping[str, list[str]],
    usual: str,
    told: bool,
    words: Mapping[str, str],
) -> str:
    names = heads[usual]
    missing = next(name for name in wanted if name not in names)
    said = no_column(what, missing, names)
    wider = max(heads, key=lambda one: len(heads[one]))
    if len(names) == 1 and len(heads[wider]) > 1:
        shown = ", ".join(heads[wider])[:120]
        return (
            f"{what} has one column where {usual!r} divides; did you mean delimiter {wider!r}? "
            f"Then it has {shown}, and {missing!r} is not among them: name the columns, or add a "
            "first row of names"
        )
    if told and len(names) == 1:
        return f"{said}; it has one column where the told delimiter {usual!r} divides"
    if any(len(name) > 40 or name.replace(".", "", 1).isdigit() or not name for name in names):
        return f"{said}; its first row looks like data: add one of column names above it"
    return no_column(what, missing, names, words.get(missing, ""), wanted)


# Ways to write a delimited file beside RFC 4180, and how they are said.
_WAYS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("", {"strict": True}),
    ("quotes were taken as text, since its rows only fit so", {"quoting": csv.QUOTE_NONE}),
    (
        "backslashes were taken to escape quotes, since its rows only fit so",
        {"strict": True, "escapechar": "\\", "doublequote": False},
    ),
)


def _rows(
    text: str, what: str, delimiter: str, width: int
) -> tuple[list[list[str]], list[int], str]:
    """The rows below the header, the line of each, and how they were written if not usually."""
    quoted = '"' in text
    problem = ""
    for note, way in _WAYS if quoted else _WAYS[:1]:
        rows, lines, wrong = _parse(text, delimiter, width, way)
        if not wrong and not note and quoted and delimiter == "\t":
            # A quote that opens and closes by accident swallows the rows between. Tabs in
            # quotes are rare; where each line fits by itself, each line is a row.
            note, way = _WAYS[1]
            plain, plain_lines, uneven = _parse(text, delimiter, width, way, exactly=True)
            if not uneven and len(plain) > len(rows):
                return plain, plain_lines, note
            note = ""
        if not wrong:
            return rows, lines, note
        problem = problem or wrong
    raise ConfigError(
        f"{what}, {problem}; put quotes around fields that hold the delimiter {delimiter!r}, a "
        'quote or a line end, quotes in them doubled (""), or name the delimiter'
    )


def _parse(
    text: str, delimiter: str, width: int, way: Mapping[str, Any], *, exactly: bool = False
) -> tuple[list[list[str]], list[int], str]:
    """Rows, their first lines, and what is wrong with the first that does not fit."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **way)
    rows: list[list[str]] = []
    lines: list[int] = []
    begun = False
    exactly = exactly or "quoting" in way
    try:
        before = 0
        for row in reader:
            line, before = before + 1, reader.line_num
            if not row or (len(row) == 1 < width and not row[0].strip()):
                continue
            if not begun:
                begun = True
                continue
            if len(row) != width and (exactly or any(cell.strip() for cell in row[width:])):
                return [], [], f"line {line}: {len(row)} fields where the first row names {width}"
            rows.append(row)
            lines.append(line)
    except csv.Error as error:
        return [], [], f"line {reader.line_num}: {_in_words(error)}"
    return rows, lines, ""


def _in_words(error: csv.Error) -> str:
    said = str(error)
    if "unexpected end" in said:
        return "the file ends inside a quote"
    if "field larger" in said:
        return f"a field of more than {MOST_FIELD >> 20} MiB, or a quote that is not closed"
    return said


# --- JSON ------------------------------------------------------------------------------------


def _json(text: str, what: str) -> Table:
    text = text.strip()
    if not text.startswith("["):
        found = _json_lines(text, what)
        if found is not None:
            return found
    try:
        whole = parse_json(text, most=MOST_BYTES, cost=_JSON_COST)
    except ValueError as error:
        raise ConfigError(f"{what} cannot be read: {error}") from error
    if isinstance(whole, dict):
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


def _json_lines(text: str, what: str) -> Table | None:
    """The table of JSON Lines; None where the first line is not the whole of an object."""
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
    if len(rows) == 1 and rows[0] and all(isinstance(v, dict | list) for v in rows[0].values()):
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


# --- Parquet ---------------------------------------------------------------------------------


def _parquet(path: Path, what: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pa.parquet.ParquetFile(path)
        names = file.schema_arrow.names

        def column(name: str) -> list[Any]:
            if names.count(name) > 1:
                raise ConfigError(f"{what} has {names.count(name)} columns {name!r}; rename one")
            try:
                return file.read([name])[name].to_pylist()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{what} cannot be read, column {name!r}: {error}") from error

        return Table(names, column)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{what} cannot be read: {error}") from error
