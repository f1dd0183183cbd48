"""Records as frozen classes: every word on the wire stands once, as the field it is read into.

A field's word is its name with hyphens. What equals its default is left out, so an absent field
means none; what comes is checked for kind, length and range before it becomes a value.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from dare_agg.errors import DareError

MAX_LENGTH = 4096
NONE: Any = dataclasses.MISSING


def said(value: Any = NONE, *, make: Callable[[], Any] = NONE) -> Any:
    """A field that is always sent, and read by whoever decides what to do with the record."""
    return dataclasses.field(default=value, default_factory=make, metadata={"said": True})


def text(pattern: str = ".*", default: Any = NONE, *, word: str = "") -> Any:
    """Text that fits a regular expression, of at most `MAX_LENGTH` characters."""
    compiled = re.compile(pattern, re.DOTALL)

    def check(value: Any) -> object:
        _need(isinstance(value, str) and len(value) <= MAX_LENGTH, "text")
        _need(compiled.fullmatch(value) is not None, f"text of the form {pattern}")
        return value

    return _checked(check, default, word)


def texts() -> Any:
    """A list of texts, none by default; a tuple once read."""

    def check(value: Any) -> object:
        _need(isinstance(value, list) and len(value) <= MAX_LENGTH, "a list of texts")
        _need(
            all(isinstance(item, str) and len(item) <= MAX_LENGTH for item in value),
            "a list of texts",
        )
        return tuple(value)

    return _checked(check, ())


def raw(length: int | None = None, default: Any = NONE) -> Any:
    """Bytes, of this length where one is given."""

    def check(value: Any) -> object:
        what = "bytes" if length is None else f"{length} bytes"
        _need(isinstance(value, bytes) and length in (None, len(value)), what)
        return value

    return _checked(check, default)


def whole(default: Any = NONE) -> Any:
    """An integer of at least 0."""

    def check(value: Any) -> object:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        _need(good, "an integer of at least 0")
        return value

    return _checked(check, default)


def number(default: Any = NONE, *, least: float = -math.inf, below: float = math.inf) -> Any:
    """A finite number in a range."""

    def check(value: Any) -> object:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        _need(good and math.isfinite(value) and least <= value < below, "a number in range")
        return float(value)

    return _checked(check, default)


def flag() -> Any:
    """True or false, false by default."""

    def check(value: Any) -> object:
        _need(isinstance(value, bool), "true or false")
        return value

    return _checked(check, False)


def word_of(field: dataclasses.Field[Any]) -> str:
    """A field's word on the wire."""
    return field.metadata.get("word") or field.name.replace("_", "-")


def words_of(kind: type) -> dict[str, str]:
    """Field name → word of everything a class puts into its record."""
    return {field.name: word_of(field) for field in dataclasses.fields(kind) if field.metadata}


class Record:
    """Base of the frozen dataclasses made of such fields."""

    def to_record(self) -> dict[str, Any]:
        """The record that travels, as plain values by their words."""
        record: dict[str, Any] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.metadata and ("said" in field.metadata or value != field.default):
                record[word_of(field)] = list(value) if isinstance(value, tuple) else value
        return record


def read_fields(
    kind: type[Record], record: Mapping[str, Any], bad: Callable[[str], DareError] | None = None
) -> dict[str, Any]:
    """The checked values of a record, by field name.

    A field that is missing and needed, or of another kind, raises ``bad(what is wrong)``; where
    ``bad`` is None it counts as absent.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        check = field.metadata.get("check")
        if check is None:
            continue
        word = word_of(field)
        try:
            if word in record:
                found[field.name] = check(record[word])
            else:
                _need(field.default is not NONE, "there")
        except ValueError as error:
            if bad is not None:
                kind_of = f"a {type(record[word]).__name__}" if word in record else "missing"
                raise bad(f"field {word!r} is {kind_of}; {error}") from None
    return found


def _checked(check: Callable[[Any], object], default: Any, word: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"check": check, "word": word})


def _need(good: bool, what: str) -> None:
    if not good:
        raise ValueError(f"it must be {what}")
