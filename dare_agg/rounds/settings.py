"""What a federated run is set to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import MASK_KINDS, DropRate, parse_drop_rate
from dare_agg.errors import (
    ConfigError,
    did_you_mean,
)
from dare_agg.merge.methods import MEAN, Method, federated_methods, find_method
from dare_agg.rounds.plan import PlanSettings
from dare_agg.rounds.step import ServerStep, server_step

WEIGHTINGS = ("examples", "equal")

# Rotated formats blur neighbours and may turn a small positive value negative.
STATISTICS_VALUES = ("f32", "bf16")


@dataclass(frozen=True)
class FederatedSettings:
    """What a federated run is set to; checked when made.

    Attributes
    ----------
    method: merge method, one of `federated_methods`. Weights are normalised to sum 1, so
        "task-arithmetic" with scaling 1 is the weighted mean.
    scaling: λ, the factor on the merged delta.
    drop_rate, values, mask: of the delta group's updates.
    dense, exclude: patterns of the dense and the local tensors.
    dense_values: value format of the dense group.
    weighting: "examples" (by the number each client reports) or "equal".
    step: what the server does with the merged delta.
    options: further options of the merge method.
    max_weight: largest number of examples a client may claim.
    rescale: False sends unscaled survivors (error feedback needs it).
    shared_mask: all clients of a round use one mask (secure sums need it; a method
        whose statistics are of survivors alone sets it).
    statistics_values: value format of the statistics that fisher and regmean need.
    """

    method: str = MEAN
    scaling: float = 1.0
    drop_rate: DropRate | float | str = "0.9"
    values: str = "b1"
    mask: str = "stratified"
    dense: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dense_values: str = "f16"
    weighting: str = "examples"
    step: ServerStep = field(default_factory=server_step)
    options: Mapping[str, Any] = field(default_factory=dict)
    max_weight: float = 1e7
    rescale: bool = True
    shared_mask: bool = False
    statistics_values: str = "bf16"
    tile: int = 1 << 16
    threads: int = 1

    def __post_init__(self) -> None:
        _check_choice("merge method", self.method, federated_methods())
        _check_choice("value format", self.values, VALUE_FORMATS)
        _check_choice("value format of the dense group", self.dense_values, VALUE_FORMATS)
        _check_choice("value format of the statistics", self.statistics_values, STATISTICS_VALUES)
        _check_choice("mask", self.mask, MASK_KINDS)
        _check_choice("weighting", self.weighting, WEIGHTINGS)
        if not isinstance(self.drop_rate, DropRate):
            object.__setattr__(self, "drop_rate", parse_drop_rate(self.drop_rate))
        for name in ("scaling", "max_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} = {value!r}; a number is needed")
            if not math.isfinite(value) or value <= 0:
                raise ConfigError(f"{name} = {value}; it must be finite and above 0")
        for name in ("dense", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"{name} = {value!r}; a list of patterns is needed: [{value!r}]")
            object.__setattr__(self, name, tuple(value))

    @property
    def row(self) -> Method:
        """The merge method's row."""
        return find_method(self.method)

    @property
    def statistics(self) -> str:
        """Kind of statistics the merge method needs: "fisher", "gram" or ""."""
        return self.row.statistics or ""

    def plan_settings(self) -> PlanSettings:
        """The part of the settings that round plans carry."""
        assert isinstance(self.drop_rate, DropRate)
        return PlanSettings(
            drop_rate=self.drop_rate,
            values=self.values,
            mask=self.mask,
            dense_values=self.dense_values,
            max_weight=float(self.max_weight),
            rescale=self.rescale,
            shared_mask=self.shared_mask or self.row.shared_mask,
            dense=self.dense,
            exclude=self.exclude,
            statistics=self.statistics,
            statistics_values=self.statistics_values if self.statistics else "",
        )


def _check_choice(what: str, value: object, known: Any) -> None:
    if value not in tuple(known):
        raise ConfigError(f"{what} {value!r} is unknown{did_you_mean(str(value), known)}")
