"""What a row of the table of merge methods holds: its options and how they are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dare_agg.errors import ConfigError, LayoutError, did_you_mean
from dare_agg.merge.task import Kernel, MergeTask
from dare_agg.vectors.patterns import compile_patterns


@dataclass(frozen=True)
class Option:
    """One option of a method: its default, what is allowed, and what it does.

    ``per_model`` options also take a list, one number for each model, and ``by_tensor`` ones an
    array over the layout's tensors: (models, tensors) where they are per model too, else
    (tensors,). ``pattern`` options are regular expressions. A ``None`` default means "not given":
    what then happens is ``usual``. ``also`` maps other words, in lower case, to choices.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    per_model: bool = False
    by_tensor: bool = False
    pattern: bool = False
    also: Mapping[str, str] = field(default_factory=dict)
    usual: Any = None

    def check(self, name: str, value: Any) -> Any:
        """Return the value in the default's type; raises `ConfigError` out of bounds."""
        if value is None and self.default is None:
            return None
        if self.by_tensor and isinstance(value, np.ndarray):
            for bound in (value.min(initial=np.inf), value.max(initial=-np.inf)):
                if value.size:
                    self.check(name, float(bound))
            return value
        if self.pattern:
            return _checked_pattern(name, value)
        if self.per_model and isinstance(value, list | tuple):
            return tuple(self.check(name, one) for one in value)
        if self.choices:
            value = self.also.get(str(value).lower(), value)
            if value not in self.choices:
                raise ConfigError(f"{name} = {value!r}{did_you_mean(str(value), self.choices)}")
            return value
        if isinstance(self.default, bool):
            if isinstance(value, bool):
                return value
            if str(value).lower() in ("true", "false"):
                return str(value).lower() == "true"
            raise ConfigError(f"{name} = {value!r}; true or false is needed")
        try:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name} = {value!r}; a number is needed") from error
        if not self.low <= number <= self.high:
            raise ConfigError(f"{name} = {value}; {self.low:g} to {self.high:g} are allowed")
        return int(number) if isinstance(self.default, int) else number


def _checked_pattern(name: str, value: Any) -> str:
    # A command line cuts values at commas, which a pattern may have.
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
    if not isinstance(text, str):
        raise ConfigError(f"{name} = {value!r}; a regular expression is needed")
    try:
        compile_patterns([text])
    except LayoutError as error:
        raise ConfigError(f"{name}: {error}") from error
    return text


@dataclass(frozen=True)
class Method:
    """One row: what it computes, what it needs, and the function that prepares it.

    ``mean`` tells whether weights default to 1/n (else 1 each); ``statistics`` names the
    kind of statistics it needs, if any, and ``shared_mask`` whether those of dropped deltas
    must be of the same elements. ``whole`` rows merge whole models: the base they are over changes
    nothing. ``own_grams`` rows make Gram matrices of the deltas, and take what else they may be
    made of: whole deltas beside dropped ones. ``federated`` are the options that a federated round
    sets, None where rounds do not merge by it. Kernels of rows with ``writes_models`` write models,
    not deltas, where asked to.
    """

    name: str
    formula: str
    reference: str
    prepare: Callable[[MergeTask], Kernel]
    options: Mapping[str, Option]
    mean: bool = False
    statistics: str | None = None
    shared_mask: bool = False
    whole: bool = False
    own_grams: bool = False
    federated: Mapping[str, Any] | None = None
    writes_models: bool = False

    def settle(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options with the given ones checked; unknown ones are refused."""
        for name in given:
            if name not in self.options:
                raise ConfigError(
                    f"method {self.name} has no option {name!r}{did_you_mean(name, self.options)}"
                )
        return {
            name: option.check(name, given[name]) if name in given else option.default
            for name, option in self.options.items()
        }
