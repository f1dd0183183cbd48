"""What a round's updates must be: said by the run's settings, carried by every plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import MASK_KINDS, DropRate, parse_drop_rate
from dare_agg.errors import ConfigError, did_you_mean

# Up to here every number of examples or tokens is a float64 of its own.
MAX_WEIGHT = float(1 << 53)
# Rotated formats blur neighbours and may turn a small positive value negative.
STATISTICS_VALUES = ("f32", "bf16")
# How much is kept of each tensor, where it is not the same of all.
KEEP_RATES: Mapping[str, str] = {
    "uniform": "the same of every tensor",
    "own": "in proportion to the tensor's change, as each client finds it: a byte a tensor",
    "last": "in proportion to its change in the round before, as the plan says: no byte up",
}


@dataclass(frozen=True)
class UpdateTerms:
    """What the updates of a round must be; checked when made.

    Attributes
    ----------
    drop_rate, values, mask
        of the delta group's updates (text or a number is read as
        `parse_drop_rate` does).
    dense, exclude
        patterns of the dense and the local tensors.
    dense_values
        value format of the dense group.
    max_weight
        largest number of examples (or tokens) a client may claim: 2^53, where float64 stops
        telling one from the next.
    rescale
        whether survivors are multiplied by 1/(1 - p); error feedback needs them as they are.
    statistics
        kind of statistics to be sent along ("" for none); a run's settings take it
        from the merge method.
    statistics_values
        value format of the statistics.
    keep_rates
        a row of `KEEP_RATES`; the drop rate then says how many bytes there are in all.
    directions, direction_bits
        leading directions of each Linear's change that travel beside the survivors (0: none), and
        bits of an element: for methods that merge by the deltas' own Gram matrices.

    Raises `ConfigError` naming the first value that is out of bounds.
    """

    drop_rate: DropRate = DropRate(10, 1)  # noqa: RUF009 (frozen)
    values: str = "b1"
    mask: str = "stratified"
    dense: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dense_values: str = "f16"
    max_weight: float = MAX_WEIGHT
    rescale: bool = True
    statistics: str = ""
    statistics_values: str = "bf16"
    keep_rates: str = "uniform"
    directions: int = 0
    direction_bits: int = 4

    def __post_init__(self) -> None:
        check_choice("value format", self.values, VALUE_FORMATS)
        check_choice("value format of the dense group", self.dense_values, VALUE_FORMATS)
        check_choice("value format of the statistics", self.statistics_values, STATISTICS_VALUES)
        check_choice("mask", self.mask, MASK_KINDS)
        check_choice("keep rates", self.keep_rates, KEEP_RATES)
        if self.keep_rates != "uniform" and self.mask != "stratified":
            raise ConfigError(
                f"keep rates {self.keep_rates!r} need mask 'stratified', not {self.mask!r}; or set "
                "keep_rates='uniform'"
            )
        check_positive("max_weight", self.max_weight)
        settled: dict[str, Any] = {
            "drop_rate": parse_drop_rate(self.drop_rate),
            "max_weight": float(self.max_weight),
        }
        for name in ("dense", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"{name} = {value!r}; a list of patterns is needed: [{value!r}]")
            settled[name] = tuple(value)
        for name, value in settled.items():
            object.__setattr__(self, name, value)


def check_choice(what: str, value: object, known: Iterable[str]) -> None:
    """Raise `ConfigError` with the nearest of ``known`` where the value is none of them."""
    if value not in tuple(known):
        raise ConfigError(f"{what} {value!r} is unknown{did_you_mean(str(value), known)}")


def check_positive(name: str, value: object) -> None:
    """Raise `ConfigError` where the value is no finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} = {value!r}; a number is needed")
    if not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name} = {value}; it must be finite and above 0")
