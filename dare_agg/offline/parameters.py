"""Numbers that may differ from tensor to tensor: gradients over the layers, values by name.

A parameter is a number, a gradient (points spread evenly over a model's layers, linear between
them) or choices: the first whose ``filter`` is a part of the tensor's name, and whose ``layers``
hold its layer, gives the value. What stands outside the layers (embeddings, the last norm, the
head) takes a gradient's first point. These are mergekit's rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainSerializer, PlainValidator

from dare_agg.errors import ConfigError, did_you_mean

_LAYER = re.compile(r"\.(\d+)\.", re.ASCII)
# Of the tensors outside the layers, those that come before them.
_BEFORE = re.compile(r"embed(?!_out)|wte|wpe|patch|pre_?l(ayer)?norm")
_MOST_POINTS = 4096


@dataclass(frozen=True)
class Gradient:
    """Points spread evenly over the layers; a value between two lies on the line."""

    points: tuple[float, ...]

    def at(self, t: float) -> float:
        """The value at depth ``t``, 0 for the first layer and 1 for the last."""
        place = t * (len(self.points) - 1)
        low = int(place)
        high = min(len(self.points) - 1, low + 1)
        return (1 - (place - low)) * self.points[low] + (place - low) * self.points[high]


@dataclass(frozen=True)
class Choice:
    """A value for tensors with ``filter`` in their names, in ``layers`` [first, stop) of OUT."""

    value: float | Gradient
    filter: str | None = None
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Choices:
    """The first choice that fits a tensor holds."""

    choices: tuple[Choice, ...]


Parameter = float | Gradient | Choices


@dataclass(frozen=True)
class Place:
    """A tensor's name, its layer's index, and of how many; −1 and ``layers`` stand for outside,
    before and after them."""

    name: str
    layer: int
    layers: int

    def depth(self, span: tuple[int, int] | None = None) -> float:
        """0 in the first layer (of ``span``) and outside, 1 in the last."""
        first, stop = span or (0, self.layers)
        if not 0 <= self.layer < self.layers:
            return 0.0
        return (self.layer - first) / (stop - first - 1) if stop - first > 1 else 1.0


def layer_of(name: str) -> tuple[str, int, str] | None:
    """What stands before a name's layer number, the number, and what stands behind it."""
    found = _LAYER.search(name)
    if found is None or len(found[1]) > 6:
        return None
    return name[: found.start(1)], int(found[1]), name[found.end(1) :]


def depth_of_stacks(names: Collection[str]) -> dict[str, int]:
    """The number of layers under each prefix, by the largest index of a name."""
    depths: dict[str, int] = {}
    for name in names:
        if found := layer_of(name):
            depths[found[0]] = max(depths.get(found[0], 0), found[1] + 1)
    return depths


def is_before(name: str) -> bool:
    """Whether a tensor outside the layers comes before them: an embedding, not a head."""
    return _BEFORE.search(name.lower()) is not None


def places(names: Sequence[str], everything: Collection[str]) -> list[Place]:
    """Where tensors stand, the layers counted over the names of ``everything``."""
    depths = depth_of_stacks(everything)
    most = max(depths.values(), default=0)
    found = []
    for name in names:
        at = layer_of(name)
        if at is None:
            found.append(Place(name, -1 if is_before(name) else most, most))
        else:
            found.append(Place(name, at[1], depths[at[0]]))
    return found


def parse_parameter(value: Any) -> Parameter:
    """Read a parameter from plain values: a number, a list of numbers, ``{gradient: […]}``, or a
    list of ``{filter, layers, value}``.

    Raises `ValueError` naming what is wrong.
    """
    if isinstance(value, Gradient | Choices):
        return value
    if isinstance(value, Mapping) and "gradient" in value:
        if set(value) != {"gradient"} or not isinstance(value["gradient"], list | tuple):
            raise ValueError("a gradient is written {gradient: [0, 0.5, 1]}")
        return _gradient(value["gradient"])
    if isinstance(value, Mapping):
        return Choices((_choice(value),))
    if not isinstance(value, list | tuple):
        return _number(value)
    if not value:
        raise ValueError("an empty list is no parameter; give a number")
    if any(isinstance(one, Mapping) for one in value):
        if len(value) > _MOST_POINTS:
            raise ValueError(f"{len(value)} choices; at most {_MOST_POINTS} are read")
        return Choices(tuple(_choice(one) for one in value))
    return _gradient(value)


def plain_parameter(parameter: Any) -> Any:
    """A parameter as plain values that `parse_parameter` reads; anything else as it is."""
    if isinstance(parameter, Gradient):
        return {"gradient": list(parameter.points)}
    if not isinstance(parameter, Choices):
        return list(parameter) if isinstance(parameter, tuple) else parameter
    plain = []
    for choice in parameter.choices:
        one: dict[str, Any] = {}
        if choice.filter is not None:
            one["filter"] = choice.filter
        if choice.layers is not None:
            one["layers"] = list(choice.layers)
        plain.append(one | {"value": plain_parameter(choice.value)})
    return plain


# A field of a recipe that holds a parameter.
ParameterField = Annotated[
    Parameter,
    PlainValidator(parse_parameter),
    PlainSerializer(plain_parameter),
]


def numbers_of(parameter: Parameter) -> Iterator[float]:
    """All numbers that a parameter names; what it gives lies between them."""
    if isinstance(parameter, Gradient):
        yield from parameter.points
    elif isinstance(parameter, Choices):
        for choice in parameter.choices:
            yield from numbers_of(choice.value)
    else:
        yield parameter


def order_key(parameter: Parameter | None) -> tuple[tuple[float, ...], str]:
    """What parameters are sorted by: numbers by size, the rest in some fixed order."""
    if parameter is None:
        return (0.0,), ""
    return tuple(numbers_of(parameter)), "" if isinstance(parameter, float) else repr(parameter)


def by_tensor(parameter: Parameter, where: Sequence[Place], what: str) -> NDArray[np.float64]:
    """A parameter's value for each tensor, (tensors,).

    Raises `ConfigError` naming the first tensor for which no choice fits.
    """
    return np.array([_value_at(parameter, place, what) for place in where], np.float64)


def _value_at(parameter: Parameter, place: Place, what: str) -> float:
    if isinstance(parameter, Gradient):
        return parameter.at(place.depth())
    if not isinstance(parameter, Choices):
        return parameter
    for choice in parameter.choices:
        if choice.filter not in (None, "*") and str(choice.filter) not in place.name:
            continue
        if choice.layers is not None and not _inside(place, choice.layers):
            continue
        value = choice.value
        return value.at(place.depth(choice.layers)) if isinstance(value, Gradient) else value
    raise ConfigError(
        f"{what} has no value for tensor {place.name!r}; end its list with an entry that has no "
        "filter: {value: 0.5}"
    )


def _inside(place: Place, span: tuple[int, int]) -> bool:
    if place.layer < 0:
        return span[0] == 0
    if place.layer >= place.layers:
        return span[1] >= place.layers
    return span[0] <= place.layer < span[1]


def _number(value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{str(value)[:60]!r} is no parameter; a number, a list of numbers (over the layers) "
            "or a list of {filter, value} is needed"
        ) from error
    return number


def _gradient(points: Sequence[Any]) -> Gradient:
    if not 0 < len(points) <= _MOST_POINTS:
        raise ValueError(f"a gradient of {len(points)} points; 1 to {_MOST_POINTS} are needed")
    return Gradient(tuple(_number(one) for one in points))


def _choice(value: Any) -> Choice:
    if not isinstance(value, Mapping) or "value" not in value:
        raise ValueError("every entry of a list by tensor is {filter: part of a name, value: …}")
    known = ("filter", "layers", "value")
    for key in value:
        if key not in known:
            raise ValueError(f"key {str(key)[:60]!r} is unknown{did_you_mean(str(key), known)}")
    chosen = parse_parameter(value["value"])
    if isinstance(chosen, Choices):
        raise ValueError("the value of a filter is a number or a list of numbers")
    named, layers = value.get("filter"), value.get("layers")
    if named is not None and not isinstance(named, str):
        raise ValueError(f"filter {str(named)[:60]!r} is no text; it is a part of a tensor's name")
    if layers is None:
        return Choice(chosen, named)
    whole = isinstance(layers, list | tuple) and all(type(one) is int for one in layers)
    if not whole or len(layers) != 2 or not 0 <= layers[0] < layers[1]:
        raise ValueError(f"layers {str(layers)[:60]} is not [first, stop] with 0 <= first < stop")
    return Choice(chosen, named, (layers[0], layers[1]))
