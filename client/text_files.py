"""The text of a data file, plain or compressed; what is no text is named as what it is."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from client.encoding import decode
from dare_agg.errors import ConfigError

_SMALL = 4 << 20  # bytes of a file that is read in a moment
MOST_BYTES = 4 << 30  # of a file, unpacked

_UNPACKED: Mapping[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_PACKED_NAMES = (".gz", ".bz2", ".xz")
# First bytes of what people name .csv, and what to do.
_OTHER_KINDS = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save the sheet as CSV UTF-8",
    b"PAR1": "a Parquet file; rename it to .parquet",
    b"version https://git-lfs": "a Git LFS pointer, not the file; fetch it with: git lfs pull",
    b"<!DOCTYPE": "a web page, not the data; download the file itself",
    b"<html": "a web page, not the data; download the file itself",
    b"%PDF": "a PDF document; export its table as CSV",
}


def is_small(path: Path) -> bool:
    """Whether a plain file is read in a moment."""
    return (
        path.is_file()
        and path.stat().st_size <= _SMALL
        and path.suffix.lower() not in _PACKED_NAMES
    )


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, without that of a compression."""
    inner = path.with_suffix("") if path.suffix.lower() in _PACKED_NAMES else path
    return inner.suffix.lower()


def read_text(path: Path, encoding: str = "") -> tuple[str, list[str]]:
    """Return a file's text and what is to be said of it; unpacks gzip, bzip2 and xz.

    Raises `ConfigError`.
    """
    what = f"data file {str(path)!r}"
    try:
        with path.open("rb") as file:
            start = file.read(32)
            file.seek(0)
            for mark, opened in _UNPACKED.items():
                if start.startswith(mark):
                    with opened(file) as unpacked:
                        data = unpacked.read(MOST_BYTES + 1)
                    break
            else:
                data = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"{what} cannot be read: {error}") from error
    if len(data) > MOST_BYTES:
        raise ConfigError(
            f"{what} is larger than {MOST_BYTES >> 30} GiB; divide it, or use Parquet"
        )
    for mark, remedy in _OTHER_KINDS.items():
        if data.lstrip()[: len(mark)].lower() == mark.lower():
            raise ConfigError(f"{what} is {remedy}")
    if not data.strip():
        raise ConfigError(f"{what} is empty; a first row of column names and rows are needed")
    return decode(data, what, encoding)
