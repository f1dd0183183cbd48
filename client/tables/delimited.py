"""Delimited text: CSV and its kin, as many programs write it."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from client.missing_columns import no_column
from client.tables.table import Table
from dare_agg.errors import ConfigError

MOST_FIELD = 1 << 24

csv.field_size_limit(MOST_FIELD)

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|", "\\t": "\t"}
_GUESSED = (",", ";", "\t", "|")
# Rows in which the words of the first one are looked for.
_LOOKED_AT = 1000


def read_delimited(
    text: str,
    what: str,
    wanted: Sequence[str],
    *,
    delimiter: str,
    usual: str,
    words: Mapping[str, str],
) -> Table:
    """The table of a text; by the ``usual`` delimiter, or another that has the wanted columns.

    ``delimiter`` is the one that was told, if any. Raises `ConfigError` with the line.
    """
    told = _delimiter(delimiter)
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
        repeats = _repeats_first_row(text, tried[0])
        raise ConfigError(_unfitting(what, wanted, heads, tried[0], bool(told), words, repeats))
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


def _delimiter(told: str) -> str:
    found = DELIMITERS.get(told, told)
    if len(found) > 1 or found in ('"', "\r", "\n"):
        raise ConfigError(
            f"delimiter {told!r}; one character is needed, or one of {', '.join(DELIMITERS)}"
        )
    return found


def _header(text: str, delimiter: str) -> list[str]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return [name.strip() for name in next((row for row in reader if row), [])]
    except csv.Error:
        return []


def _repeats_first_row(text: str, delimiter: str) -> bool:
    """Whether a word of the first row stands below it too, in its column: it names no column."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        first, *rows = [row for row in itertools.islice(reader, _LOOKED_AT) if row] or [[]]
    except csv.Error:
        return False
    return any(
        name.strip() and name == value
        for row in rows
        for name, value in zip(first, row, strict=False)
    )


def _unfitting(
    what: str,
    wanted: Sequence[str],
    heads: Mapping[str, list[str]],
    usual: str,
    told: bool,
    words: Mapping[str, str],
    repeats: bool,
) -> str:
    names = heads[usual]
    missing = next(name for name in wanted if name not in names)
    said = no_column(what, missing, names)
    if names and names[0].startswith("#"):
        return f"{said}; its first line is a comment: take it out, so that the names stand first"
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
    data = (len(name) > 40 or name.replace(".", "", 1).isdigit() or not name for name in names)
    if repeats or any(data):
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
