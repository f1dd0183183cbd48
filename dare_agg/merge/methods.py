"""The table of merge methods: names, formulas, options, references."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dare_agg.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Option:
    """One option of a method: its default, what is allowed, and what it does."""

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf

    def check(self, name: str, value: Any) -> Any:
        """Return the value in the default's type; raises `ConfigError` out of bounds."""
        if self.choices:
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


@dataclass(frozen=True)
class Method:
    """One row. ``mean`` tells whether weights default to 1/n (else 1 each)."""

    name: str
    formula: str
    reference: str
    mean: bool
    options: Mapping[str, Option]

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


_DARE_PAPER = "https://arxiv.org/abs/2311.03099"
_TRIM = Option(0.8, "fraction of each delta removed, smallest first", low=0, high=1)

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("average", "base + λ·Σ w·δ, w = 1/n", "https://arxiv.org/abs/2203.05482", True, {}),
        Method(
            "task-arithmetic",
            "base + λ·Σ w·δ, w = 1",
            "https://arxiv.org/abs/2212.04089",
            False,
            {"normalize": Option(False, "divide by the sum of the weights")},
        ),
        Method(
            "ties",
            "base + λ·mean of the trimmed entries that agree with sign(Σ w·δ)",
            "https://arxiv.org/abs/2306.01708",
            False,
            {
                "trim": _TRIM,
                "trim-scope": Option(
                    "model", "rank over the whole model or each tensor", ("model", "tensor")
                ),
                "normalize": Option(
                    "agreeing",
                    "divide by the agreeing weights, by the expected weights n(1-p), or not",
                    ("agreeing", "expected", "none"),
                ),
                "sign-tie": Option(
                    "majority",
                    "an exact zero sum takes the majority sign, or counts as +",
                    ("majority", "positive"),
                ),
            },
        ),
    )
}


def find_method(name: str) -> Method:
    """Return the row of a merge method; an unknown name raises `ConfigError`."""
    if name not in METHODS:
        raise ConfigError(f"merge method {name!r} is unknown{did_you_mean(name, METHODS)}")
    return METHODS[name]
