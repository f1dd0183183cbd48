"""A robust rule as it is written: "nnm+trimmed-mean", "norm-bound(times=2)+momentum+median"."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.robust.stages import BEFORE, BOUND, MOMENTUM, RULE, STAGES, Number, Stage

_CALL = re.compile(r"\s*([\w-]+)\s*(?:\((.*)\)\s*)?", re.DOTALL)
# A plus inside brackets belongs to a number.
_JOINED = re.compile(r"\+(?![^(]*\))")
# What may follow a stage of each kind.
_NEXT: Mapping[str, tuple[str, ...]] = {
    BOUND: (BOUND, MOMENTUM, BEFORE, RULE),
    MOMENTUM: (BOUND, BEFORE, RULE),
    BEFORE: (BEFORE, RULE),
    RULE: (),
}
MOST_BYZANTINE = 1 << 20


@dataclass(frozen=True)
class Called:
    """A stage with its numbers."""

    name: str
    numbers: Mapping[str, float]

    @property
    def row(self) -> Stage:
        """Its row of `STAGES`."""
        return STAGES[self.name]

    def __str__(self) -> str:
        own = {k: v for k, v in self.numbers.items() if v != self.row.numbers[k].default}
        return self.name + (f"({', '.join(f'{k}={v:g}' for k, v in own.items())})" if own else "")


@dataclass(frozen=True)
class RobustRule:
    """Stages in order, the rule last, and how many clients may be Byzantine; see `robust_rule`."""

    stages: tuple[Called, ...]
    byzantine: int

    def __str__(self) -> str:
        return "+".join(map(str, self.stages))

    @property
    def rule(self) -> Called:
        """The last stage."""
        return self.stages[-1]

    @property
    def votes(self) -> bool:
        """Whether clients must send the same elements: one shared mask a round."""
        return any(called.row.votes for called in self.stages)

    @property
    def bounds_only(self) -> bool:
        """Whether it does nothing but bound each client: what is left is merged by any method."""
        return all(c.row.kind == BOUND or c.name == "mean" for c in self.stages)

    def without_bounds(self) -> RobustRule:
        """The rule for the dense group, where it bears f without bounds; else itself.

        There counters stand among running statistics and heads: a bound would shorten them too,
        and a counter that counts less than 1 a round stands still.
        """
        if not self.rule.row.guards:
            return self
        return replace(self, stages=tuple(c for c in self.stages if c.row.kind != BOUND))

    @property
    def beta(self) -> float:
        """The factor of each client's momentum, 0 without."""
        return next((c.numbers["beta"] for c in self.stages if c.row.kind == MOMENTUM), 0.0)

    @property
    def least(self) -> int:
        """The fewest clients of a round for which the rule bears ``byzantine`` of them."""
        found = 1
        for called in reversed(self.stages):
            found = called.row.least(self.byzantine, found, called.numbers)
        return found

    def parts(self) -> tuple[tuple[Called, ...], tuple[Called, ...]]:
        """The stages before momentum, and those after it but for the rule; all without one."""
        names = [called.row.kind for called in self.stages]
        if MOMENTUM not in names:
            return (), self.stages[:-1]
        at = names.index(MOMENTUM)
        return self.stages[:at], self.stages[at + 1 : -1]

    def check_clients(self, clients: int, remedy: str) -> None:
        """Raise `ConfigError` where a round may have too few clients for the rule."""
        if clients < self.least:
            raise ConfigError(
                f"robust = {str(self)!r} bears byzantine = {self.byzantine} of at least "
                f"{self.least} clients a round, and a round may have {clients}; {remedy}, name a "
                "smaller byzantine, or another rule"
            )


def robust_rule(text: str, byzantine: int) -> RobustRule:
    """Read a rule as it is written in a run config; ``byzantine`` is f.

    >>> str(robust_rule("nnm + trimmed-mean", 2))
    'nnm+trimmed-mean'

    Raises `ConfigError` for an unknown stage or number, one out of bounds, stages out of order,
    and for an f that is no number of clients: of 0 nothing is borne.
    """
    if isinstance(byzantine, bool) or not isinstance(byzantine, int):
        raise ConfigError(f"byzantine = {byzantine!r}; a whole number of clients is needed")
    if not 1 <= byzantine <= MOST_BYZANTINE:
        raise ConfigError(
            f"byzantine = {byzantine} with robust = {text!r}: say of how many clients a round "
            "anything may come, at least 1; or leave robust out"
        )
    stages = [_called(part, text) for part in _JOINED.split(text)]
    if stages[-1].row.kind != RULE:
        stages.append(Called("mean", MappingProxyType({})))
    for before, after in itertools.pairwise(stages):
        if after.row.kind not in _NEXT[before.row.kind]:
            raise ConfigError(
                f"robust = {text!r}: {after.name} cannot follow {before.name}; the order is "
                "bounds, momentum, bounds, what pre-aggregates, and one rule last"
            )
    if not any(called.row.guards for called in stages):
        able = ", ".join(name for name, row in STAGES.items() if row.guards)
        raise ConfigError(
            f"robust = {text!r} bears no Byzantine client: one moves such a mean as far as it "
            f"likes; add one of {able}"
        )
    return RobustRule(tuple(stages), byzantine)


def check_robust(text: str, byzantine: int) -> RobustRule | None:
    """The rule, or None where neither word is given; raises `ConfigError` for one alone."""
    if text:
        return robust_rule(text, byzantine)
    if byzantine or isinstance(byzantine, bool) or not isinstance(byzantine, int):
        raise ConfigError(
            f"byzantine = {byzantine!r} without robust; name the rule that is to bear them, for "
            'example robust = "norm-bound+nnm+trimmed-mean", or leave it out'
        )
    return None


def _called(part: str, text: str) -> Called:
    call = _CALL.fullmatch(part)
    if call is None:
        raise ConfigError(
            f"robust = {text!r}: {part.strip()!r} cannot be read; write names joined by +, with "
            'numbers as in "norm-bound(times=2)+median"'
        )
    name = call[1]
    if name not in STAGES:
        raise ConfigError(f"robust: {name!r} is unknown{did_you_mean(name, STAGES)}")
    known = STAGES[name].numbers
    found = {key: number.default for key, number in known.items()}
    given: set[str] = set()
    for piece in filter(None, (piece.strip() for piece in (call[2] or "").split(","))):
        key, _, value = (one.strip() for one in piece.partition("="))
        if key not in known:
            raise ConfigError(f"robust: {name} has no number {key!r}{did_you_mean(key, known)}")
        if key in given:
            raise ConfigError(f"robust: {name} is given {key} twice; give it once")
        given.add(key)
        found[key] = _number(name, key, value, known[key])
    return Called(name, MappingProxyType(found))


def _number(name: str, key: str, text: str, number: Number) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ConfigError(f"robust: {name}({key}={text}) is no number; write {key}=2") from error
    kind = "a whole number" if number.whole else "a number"
    good = math.isfinite(value) and number.low <= value <= number.high
    if not good or (number.whole and value != int(value)):
        raise ConfigError(
            f"robust: {name}({key}={text}); {kind} from {number.low:g} to {number.high:g} is needed"
        )
    return value
