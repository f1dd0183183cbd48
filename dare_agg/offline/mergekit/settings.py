"""What a setting comes to: the first scope that has a value for a tensor holds.

A model's own settings come before its slice's, these before the module's and the file's. A list of
filters none of which fits leaves the value to the next scope.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dare_agg.errors import ConfigError
from dare_agg.offline.mergekit.document import Settings
from dare_agg.offline.mergekit.words import at_line
from dare_agg.offline.parameters import (
    Choice,
    Choices,
    Gradient,
    Parameter,
    parse_parameter,
)
from dare_agg.offline.yaml_text import Located

Span = tuple[int, int]
_TRUE, _FALSE = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")


@dataclass(frozen=True)
class Scopes:
    """Where one model's (or the shared) settings of one slice are looked up, first to last."""

    settings: tuple[Settings, ...]
    line: int

    def given(self, key: str) -> list[Located]:
        """The settings of this name that are given."""
        return [scope[key] for scope in self.settings if key in scope]

    def number(self, key: str, default: float | None) -> Parameter:
        """A setting as a parameter of ours; ``default`` closes it where filters leave gaps.

        Raises `ConfigError` where none is given and there is no default.
        """
        choices: list[Choice] = []
        for located in self.given(key):
            found = _parameter(key, located)
            if not isinstance(found, Choices):
                return _closed(choices, found)
            for choice in found.choices:
                choices.append(choice)
                if choice.filter in (None, "*"):
                    return Choices(tuple(choices))
        if default is not None:
            return _closed(choices, default)
        if choices:
            return Choices(tuple(choices))
        raise at_line(self.line, f"{key} is missing; give it under parameters:")

    def truth(self, key: str, default: bool) -> bool:
        """A setting that is on or off.

        Raises `ConfigError` for one that differs from tensor to tensor.
        """
        for located in self.given(key):
            value = located.plain()
            if isinstance(value, list | Mapping):
                raise at_line(located.line, f"{key} is one value for all tensors; give that")
            word = str(value).lower().removesuffix(".0")
            if word not in (*_TRUE, *_FALSE):
                raise at_line(located.line, f"{key} is true or false, not {str(value)[:40]!r}")
            return word in _TRUE
        return default

    def plain(self, key: str, default: float) -> float:
        """A setting that is one number for all tensors."""
        found = self.number(key, default)
        if not isinstance(found, float | int):
            line = self.given(key)[0].line
            raise at_line(line, f"{key} is one number for all tensors; give that")
        return found


def over_slices(parts: Sequence[tuple[Parameter, Span | None]]) -> Parameter:
    """One parameter of what each of OUT's runs of layers has."""
    first = parts[0][0]
    alone = len(parts) == 1
    if alone or (isinstance(first, float) and all(part == first for part, _ in parts)):
        return first
    choices: list[Choice] = []
    for part, span in parts:
        given = part.choices if isinstance(part, Choices) else (Choice(part),)
        choices += [replace(choice, layers=span) for choice in given]
    return Choices(tuple(choices))


def changed(parameter: Parameter, change: Callable[[float], float]) -> Parameter:
    """A parameter with each of its numbers changed."""
    if isinstance(parameter, Gradient):
        return Gradient(tuple(change(point) for point in parameter.points))
    if isinstance(parameter, Choices):
        return Choices(
            tuple(replace(c, value=changed(c.value, change)) for c in parameter.choices)  # type: ignore[arg-type]
        )
    return change(parameter)


def _closed(choices: Sequence[Choice], last: Parameter) -> Parameter:
    if not choices:
        return last
    assert not isinstance(last, Choices)
    return Choices((*choices, Choice(last)))


def _parameter(key: str, located: Located) -> Parameter:
    for entry in located.value if isinstance(located.value, list) else [located]:
        if isinstance(entry.value, dict):
            _check_entry(key, entry)
    try:
        return parse_parameter(located.plain())
    except ValueError as error:
        said = error.args[0] if not isinstance(error, ConfigError) else str(error)
        raise at_line(located.line, f"{key}: {said}") from error


def _check_entry(key: str, entry: Located) -> None:
    for word, one in entry.value.items():
        if word not in ("filter", "value"):
            raise at_line(one.line, f"{word[:60]!r} of {key}: an entry is {{filter, value}}")
