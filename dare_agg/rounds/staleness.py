"""What an update counts for that was trained from an older version: a table of rules.

A client that was asked τ merges ago trained from a version that the model has left since. Its
update, its dense group too, is multiplied by s(τ) before anything else looks at it: of a buffer's
mean it is nᵢ/Σnⱼ·s(τᵢ), and the weights are not brought back to a sum of 1, so that a buffer of old
updates moves the model less. A new rule is a function and a row here, a test and a line in
docs/ASYNC.md.

Reference: Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", arXiv
2106.06581 (sqrt); Xie et al. 2019, "Asynchronous Federated Optimization", arXiv 1903.03934
(polynomial, hinge, constant); Wang and Ji 2024, "A Lightweight Method for Tackling Unknown
Participation Statistics in Federated Averaging", arXiv 2306.03401 (interval).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.rounds.called import read_call
from dare_agg.rounds.chain import Passed, StepContext, UpdateStep, scaled
from dare_agg.rounds.server import Accepted

# Factors are whole parts of 2^20: a power of another platform's libm is the same number then.
_PARTS = 1 << 20


@dataclass(frozen=True)
class StalenessRow:
    """A rule's numbers with their defaults, all at least 0, and s(τ) of τ ≥ 0."""

    defaults: Mapping[str, float]
    factor: Callable[..., float]
    about: str


def _polynomial(tau: int, a: float) -> float:
    return float((1.0 + tau) ** -a)


def _hinge(tau: int, a: float, b: float) -> float:
    return 1.0 if tau <= b else 1.0 / (a * (tau - b) + 1.0)


def _linear(tau: int, over: float) -> float:
    return max(0.0, 1.0 - tau / over) if over else 0.0


def _interval(tau: int, most: float) -> float:
    return min(1.0 + tau, most) / most if most else 0.0


STALENESS: Mapping[str, StalenessRow] = MappingProxyType(
    {
        "sqrt": StalenessRow({}, lambda tau: 1.0 / math.sqrt(1.0 + tau), "1/√(1+τ) (FedBuff)"),
        "polynomial": StalenessRow({"a": 0.5}, _polynomial, "(1+τ)^−a"),
        "hinge": StalenessRow({"a": 1.0, "b": 2.0}, _hinge, "1 up to b, then 1/(a·(τ−b)+1)"),
        "linear": StalenessRow({"over": 32.0}, _linear, "1−τ/over, nothing from over on"),
        "interval": StalenessRow(
            {"most": 5.0}, _interval, "min(1+τ, most)/most: as long as its client was away (FedAU)"
        ),
        "constant": StalenessRow({}, lambda tau: 1.0, "1: age does not count"),
    }
)


@dataclass(frozen=True)
class StalenessRule:
    """A row of `STALENESS` with its numbers; make one with `staleness_rule`."""

    name: str
    numbers: Mapping[str, float]

    def __str__(self) -> str:
        words = ", ".join(f"{key}={value:g}" for key, value in self.numbers.items())
        return f"{self.name}({words})" if words else self.name

    def factor(self, tau: int) -> float:
        """s(τ), from 0 to 1."""
        exact = STALENESS[self.name].factor(tau, **self.numbers)
        return round(exact * _PARTS) / _PARTS

    def check(self, max_staleness: int) -> None:
        """Raise `ConfigError` where an update that is not too old would count for nothing."""
        for tau in range(max_staleness + 1):
            if self.factor(tau) <= 0:
                raise ConfigError(
                    f"staleness = {str(self)!r} gives an update that is {tau} merges old nothing, "
                    f"and max-staleness = {max_staleness} lets it count; set max-staleness to "
                    f"{max(tau - 1, 0)} or lower, or another rule (sqrt)"
                )


def staleness_rule(text: str = "sqrt") -> StalenessRule:
    """Read a rule as a run config has it.

    Raises `ConfigError` for an unknown rule or number, and one that is not finite or below 0.

    >>> staleness_rule("sqrt").factor(3)
    0.5
    """
    name, numbers = read_call("staleness", text, "polynomial(a=0.5)")
    if name not in STALENESS:
        raise ConfigError(f"staleness {name!r} is unknown{did_you_mean(name, STALENESS)}")
    defaults = STALENESS[name].defaults
    for key, value in numbers.items():
        if key not in defaults:
            raise ConfigError(f"staleness {name!r} has no number {key!r}{_known(key, defaults)}")
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(
                f"staleness {name!r}: {key} = {value!r}; it must be finite and at least 0"
            )
    return StalenessRule(name, MappingProxyType({**defaults, **numbers}))


def staleness_step(rule: StalenessRule) -> UpdateStep:
    """The first step of a buffer's chain: each update by s(τ), τ being the merges since its plan.

    It measures ``staleness`` and ``factors``, in the order of the plans.
    """

    def step(accepted: Sequence[Accepted], context: StepContext) -> Passed:
        taus = [context.round - reply.plan.round for reply in accepted]
        factors = [rule.factor(tau) for tau in taus]
        weighed = tuple(scaled(one, factor) for one, factor in zip(accepted, factors, strict=True))
        told: Mapping[str, Any] = {"staleness": taus, "factors": factors}
        return Passed(weighed, measurements=(told,))

    return step


def _known(key: str, defaults: Mapping[str, float]) -> str:
    return did_you_mean(key, defaults) if defaults else "; it has none: leave it out"
