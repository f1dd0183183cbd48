"""A file's table, by what the file is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from client.tables.delimited import read_delimited
from client.tables.json_rows import read_json
from client.tables.parquet import read_parquet
from client.tables.table import Table
from client.text_files import kind_of, read_text

_DELIMITED = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_JSON = (".json", ".jsonl", ".ndjson")
SUFFIXES = (*_DELIMITED, *_JSON, ".parquet")


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
        return read_parquet(path, what)
    text, notes = read_text(path, encoding)
    if kind in _JSON:
        table = read_json(text, what, wanted)
    else:
        table = read_delimited(
            text,
            what,
            wanted,
            delimiter=delimiter,
            usual=_DELIMITED.get(kind, ","),
            words=words or {},
        )
    return Table(table.names, table.column, table.row, [*notes, *table.notes])
