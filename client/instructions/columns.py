"""The columns of a file or folder told from its beginning, without reading all of it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
from functools import lru_cache
from pathlib import Path
from typing import Any

from client.tables.delimited import DELIMITERS
from client.tables.read import SUFFIXES
from client.text_files import kind_of
from dare_agg.files.json_text import parse_json, read_settings

_PEEKED = 1 << 20  # bytes of a file


def columns_of(path: Path, delimiter: str = "") -> tuple[tuple[str, ...], ...]:
    """The columns a file or `datasets` folder may have, one reading a possible delimiter.

    () where they are not told by its beginning.
    """
    try:
        stamp = path.stat()
    except OSError:
        return ()
    return _columns(path, delimiter, stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=16)
def _columns(path: Path, delimiter: str, changed: int, size: int) -> tuple[tuple[str, ...], ...]:
    if path.is_dir():
        for inside in (path, path / "train"):
            if features := read_settings(inside / "dataset_info.json").get("features"):
                return (tuple(features),)
        return ()
    kind = kind_of(path)
    if kind not in SUFFIXES:
        return ()
    if kind == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        try:
            return (tuple(pa.parquet.read_schema(path).names),)
        except (pa.ArrowException, OSError):
            return ()
    start = _start(path)
    if kind in (".json", ".jsonl", ".ndjson"):
        return _names_in_json(start)
    first = next((line for line in start.splitlines() if line.strip()), "")
    if first.lower().startswith("sep="):
        first = next((line for line in start.splitlines()[1:] if line.strip()), "")
    marks = (DELIMITERS.get(delimiter, delimiter),) if delimiter else (",", "\t", ";", "|")
    read = [next(csv.reader(io.StringIO(first), delimiter=m), []) for m in marks if len(m) == 1]
    return tuple(tuple(name.strip() for name in names) for names in read)


def _start(path: Path) -> str:
    """The beginning of a file's text; names of columns are told whatever its encoding."""
    openers = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open))
    try:
        with path.open("rb") as file:
            mark = file.read(8)
        opened: Any = next((one for start, one in openers if mark.startswith(start)), open)
        with opened(path, "rb") as file:
            data = file.read(_PEEKED)
    except (OSError, EOFError, lzma.LZMAError):
        return ""
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if wide else "utf-8-sig", "ignore")


def _names_in_json(start: str) -> tuple[tuple[str, ...], ...]:
    """The keys of the first object, which may be the first of a list."""
    text = start.lstrip().removeprefix("[").lstrip()
    try:
        value = parse_json(text[: _object_end(text)])
    except ValueError:
        return ()
    return (tuple(map(str, value)),) if isinstance(value, dict) else ()


def _object_end(text: str) -> int:
    """Behind the brace that closes the object a text begins with; 0 where none does."""
    depth, inside, escaped = 0, False, False
    for place, one in enumerate(text):
        if escaped:
            escaped = False
        elif inside:
            escaped, inside = one == "\\", one != '"'
        elif one == '"':
            inside = True
        elif one in "{[":
            depth += 1
        elif one in "}]":
            depth -= 1
            if depth == 0:
                return place + 1
    return 0
