"""YAML from outside, read within bounds, aliases counted as what they stand for.

A few lines of YAML can name a thousand million values: each line a list of ten aliases to the
line before. Aliases as people use them stay possible, since what they expand to is bounded.
"""

from __future__ import annotations

from typing import Any

import yaml

from dare_agg.errors import FormatError

MOST_BYTES = 256 << 10
MOST_DEPTH = 64
MOST_VALUES = 1 << 16
# Of an unquoted scalar: as a number in base 60 a long one would take minutes to read.
_MOST_PLAIN = 4096


def parse_yaml(text: str) -> Any:
    """The value of a YAML document with plain tags alone.

    Raises `FormatError`, which is a `ValueError` too, where it is malformed, too large, nested
    too deep or expands to more than `MOST_VALUES` values.
    """
    if len(text) > MOST_BYTES:
        raise FormatError(f"YAML of {len(text)} characters; at most {MOST_BYTES} are read")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _measure(text, loader)
        return yaml.load(text, Loader=loader)
    except FormatError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise FormatError(f"no YAML: {' '.join(str(error).split())[:200]}") from error


def _measure(text: str, loader: Any) -> None:
    sizes: dict[str, int] = {}
    # Anchors and sizes of the collections that are open.
    around: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            around.append((event.anchor, 1))
            if len(around) > MOST_DEPTH:
                raise FormatError(f"YAML nested more than {MOST_DEPTH} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = around.pop()
        elif isinstance(event, yaml.AliasEvent):
            # Of a collection that is still open, or of nothing.
            if event.anchor not in sizes:
                raise FormatError(
                    f"YAML alias {str(event.anchor)[:80]!r} stands for nothing, or for itself"
                )
            anchor, size = None, sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
            if event.implicit[0] and len(event.value) > _MOST_PLAIN:
                raise FormatError(
                    f"an unquoted value of {len(event.value)} characters; quote what is longer "
                    f"than {_MOST_PLAIN}"
                )
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        outer, count = around[-1]
        around[-1] = (outer, count + size)
        if count + size > MOST_VALUES:
            raise FormatError(f"YAML that expands to more than {MOST_VALUES} values")
