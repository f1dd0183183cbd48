"""Patterns of tensor names: regular expressions in linear time, whoever wrote them.

Patterns come from servers, recipes and files. Python's own engine backtracks: for
``^(\\w+\\.?)+!$`` one name can keep a core busy for days. RE2 does not, and has neither
back-references nor look-around; ``\\w``, ``\\d`` and ``\\s`` mean ASCII.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import re2

from dare_agg.errors import LayoutError

MAX_PATTERN = 1000


class Pattern(Protocol):
    """A compiled pattern."""

    def search(self, text: str) -> Any:
        """Where the pattern is found in ``text``; None for nowhere."""


def compile_patterns(patterns: Iterable[str]) -> tuple[Pattern, ...]:
    """Compile patterns; a bad one, or one of over 1,000 characters, raises `LayoutError`.

    >>> matches("encoder.layer.0.weight", compile_patterns([r"layer\\.\\d+\\."]))
    True
    """
    options = re2.Options()
    options.log_errors = False
    compiled = []
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN:
            raise LayoutError(
                f"pattern {pattern[:40]!r}… of {len(pattern)} characters; at most "
                f"{MAX_PATTERN} are allowed: write several shorter ones"
            )
        try:
            compiled.append(re2.compile(pattern, options))
        except (re2.error, UnicodeError) as error:
            raise LayoutError(
                f"pattern {pattern!r} is not a regular expression: {_words(error)} (RE2 "
                "syntax: no back-references, no look-around)"
            ) from error
    return tuple(compiled)


def matches(name: str, patterns: Sequence[Pattern]) -> bool:
    """Whether any pattern is found anywhere in ``name``."""
    return any(pattern.search(name) for pattern in patterns)


def _words(error: Exception) -> str:
    said = error.args[0] if error.args else error
    return said.decode(errors="replace") if isinstance(said, bytes) else str(said)
