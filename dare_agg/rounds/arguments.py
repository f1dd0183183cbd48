"""Checks of the arguments that a run is made with; each returns what it was given."""

from __future__ import annotations

from dare_agg.errors import ConfigError
from dare_agg.rounds.step import ServerStep, server_step


def as_step(step: str | ServerStep) -> ServerStep:
    """A server step by its name, or the step itself."""
    return step if isinstance(step, ServerStep) else server_step(step)


def fraction(name: str, value: float) -> float:
    """``value`` as a float; `ConfigError` unless it is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name} = {value!r}; a number from 0 to 1 is needed")
    return float(value)


def count(name: str, value: int, least: int = 0) -> int:
    """``value``; `ConfigError` unless it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} = {value!r}; an integer of at least {least} is needed")
    return value


def seconds(name: str, value: float | None) -> float | None:
    """``value`` as a float, None stays; `ConfigError` unless above 0 and below 1e9."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ConfigError(f"{name} = {value!r}; a number of seconds above 0 is needed")
    return float(value)
