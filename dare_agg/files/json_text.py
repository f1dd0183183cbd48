"""JSON from outside, read within bounds: of bytes, of depth and of what its values would take.

The parser of the standard library recurses as deep as a text is nested and makes objects of
many times the text's size. So a text is measured first, without being parsed.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dare_agg.errors import FormatError

MOST_BYTES = 4 << 20
MOST_DEPTH = 64
# Of about 32 bytes each: see `_cost`.
MOST_COST = 1 << 19
_BLOCK = 1 << 20
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NO_MARKS = bytes(set(range(256)) - set(b'[]{},"'))
# The beginning of half a surrogate pair, whole or not.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(
    text: str | bytes,
    *,
    most: int = MOST_BYTES,
    cost: int = MOST_COST,
    unique: bool = False,
    any_text: bool = False,
) -> Any:
    """The value of a JSON text (bytes: of UTF-8) of at most ``most`` bytes.

    Raises `FormatError`, which is a `ValueError` too, for a text that is malformed, too large,
    nested more than `MOST_DEPTH` deep or holds too many values; for names and strings that are
    no text (half a surrogate pair), unless the caller looks at them (``any_text``); where
    ``unique``, for a key that stands twice.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > most:
        raise FormatError(f"JSON of {len(data)} bytes; at most {most} are read")
    _measure(data, cost)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique if unique else None)
        if not any_text and _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"no JSON: {str(error)[:200]}") from error
    return value


def read_json(path: Path, *, most: int = MOST_BYTES) -> Any:
    """The value of a JSON file, as `parse_json`; raises `OSError` too."""
    return parse_json(read_bounded(path, most), most=most)


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file of settings; {} where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        values = read_json(path)
        if isinstance(values, dict):
            return values
    return {}


def read_bounded(path: Path, most: int) -> bytes:
    """A file's content; raises `FormatError` where it is larger than ``most`` bytes."""
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FormatError(f"{path} is larger than {most} bytes, the most that is read")
    return data


def _measure(data: bytes, most: int) -> None:
    """Raise `FormatError` where a text is nested too deep or its values would take too much."""
    if data.count(b"[") + data.count(b"{") <= MOST_DEPTH and _cost(data) <= most:
        return
    found, parts = 0, []
    for bare in _outside_strings(data):
        found += _cost(bare)
        if found > most:
            raise FormatError(f"JSON of too many values (cost above {most}, the most that is read)")
        parts.append(bare.translate(_ONE_KIND, b","))
    level = b"".join(parts)
    for _ in range(MOST_DEPTH):
        # Each pass takes off the innermost pairs.
        level = level.replace(b"[]", b"")
    if b"[]" in level:
        raise FormatError(f"JSON nested more than {MOST_DEPTH} deep")


def _outside_strings(data: bytes) -> Iterator[bytes]:
    """The brackets and commas of a text that are not in one of its strings, block by block."""
    import numpy as np

    marks = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_MARKS)
    begins_inside = False
    for at in range(0, len(marks), _BLOCK):
        found = np.frombuffer(marks, np.uint8, min(_BLOCK, len(marks) - at), at)
        quotes = found == ord('"')
        inside = np.bitwise_xor.accumulate(quotes) ^ begins_inside
        begins_inside = bool(inside[-1])
        yield found[~(inside | quotes)].tobytes()


def _cost(data: bytes) -> int:
    """What values take, in units of about 32 bytes: objects 8, lists 3, each further member 2."""
    return 8 * data.count(b"{") + 3 * data.count(b"[") + 2 * data.count(b",")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise FormatError(f"key {key[:80]!r} stands twice")
        found[key] = value
    return found
