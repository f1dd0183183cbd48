"""YAML: from outside, read within bounds, aliases counted as what they stand for; and written.

A few lines of YAML can name a thousand million values: each line a list of ten aliases to the
line before. Aliases as people use them stay possible, since what they expand to is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from dare_agg.errors import FormatError

MOST_BYTES = 256 << 10
MOST_DEPTH = 64
MOST_VALUES = 1 << 16
# Of an unquoted scalar: as a number in base 60 a long one would take minutes to read.
_MOST_PLAIN = 4096


@dataclass(frozen=True)
class Located:
    """A value and the line that it, or its key, stands on.

    Mappings (with texts as keys) and lists hold located values again; the rest is plain.
    """

    value: Any
    line: int

    def plain(self) -> Any:
        """The value without its lines."""
        if isinstance(self.value, dict):
            return {key: one.plain() for key, one in self.value.items()}
        if isinstance(self.value, list):
            return [one.plain() for one in self.value]
        return self.value


def parse_yaml(text: str) -> Any:
    """The value of a YAML document with plain tags alone.

    Raises `FormatError`, which is a `ValueError` too, where it is malformed, too large, nested
    too deep or expands to more than `MOST_VALUES` values.
    """
    return _parsed(text, lambda loader: yaml.load(text, Loader=loader))


def parse_yaml_with_lines(text: str) -> Located:
    """The value of a YAML document, with the line of each part.

    Raises `FormatError` as `parse_yaml`, and for a key that is there twice and a second document.
    """
    return _parsed(text, lambda loader: _located(loader(text)))


def write_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML in their order; what is no plain value as its text."""
    return yaml.safe_dump(_plain(values), sort_keys=False, default_flow_style=None).strip()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _parsed(text: str, parse: Callable[[Any], Any]) -> Any:
    if len(text) > MOST_BYTES:
        raise FormatError(f"YAML of {len(text)} characters; at most {MOST_BYTES} are read")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _measure(text, loader)
        return parse(loader)
    except FormatError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise FormatError(f"no YAML: {' '.join(str(error).split())[:200]}") from error


def _located(loader: Any) -> Located:
    node = loader.get_node() if loader.check_node() else None
    if loader.check_node():
        line = loader.get_node().start_mark.line + 1
        raise FormatError(f"line {line}: another document begins; give each in a file of its own")
    return Located(None, 1) if node is None else _value(loader, node, node.start_mark.line + 1)


def _value(loader: Any, node: Any, line: int) -> Located:
    if isinstance(node, yaml.SequenceNode):
        return Located([_value(loader, n, n.start_mark.line + 1) for n in node.value], line)
    if not isinstance(node, yaml.MappingNode):
        return Located(loader.construct_object(node), line)
    _check_keys(node)
    # What "<<" takes over from elsewhere comes first, so that own keys hold.
    loader.flatten_mapping(node)
    return Located(
        {key.value: _value(loader, one, key.start_mark.line + 1) for key, one in node.value}, line
    )


def _check_keys(node: Any) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise FormatError(f"line {line}: a key is a word, not a list or a mapping")
        if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
            raise FormatError(
                f"line {line}: {key.value[:80]!r} stands on line {seen[key.value]} already; leave "
                "one of them"
            )
        seen[key.value] = line


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
