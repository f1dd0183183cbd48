"""Slices laid one on another: models of pieces, and numbers that differ by layer.

The first models of all slices make one model, the second ones another, and so on; what a method
says of each slice becomes one recipe, whose numbers hold for the slice's layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dare_agg.errors import ConfigError
from dare_agg.offline.mergekit.casting import Cast, Member
from dare_agg.offline.mergekit.document import Settings
from dare_agg.offline.mergekit.methods import Said
from dare_agg.offline.mergekit.settings import Span, over_slices
from dare_agg.offline.mergekit.words import at_line
from dare_agg.offline.parameters import Choices, Gradient

# A layer's number in a part of a tensor's name.
_NUMBER = re.compile(r"(^|\.)\d+(\.|$)", re.ASCII)
# Our methods to which a model of weight 0 adds nothing.
_WEIGHTED = ("linear", "task-arithmetic", "ties", "della", "breadcrumbs")


def spans_of(casts: Sequence[Cast]) -> list[Span | None]:
    """Which of OUT's layers each slice makes; None for a merge of whole models.

    Raises `ConfigError` for sources of one slice with different numbers of layers.
    """
    spans: list[Span | None] = []
    at = 0
    for cast in casts:
        lengths = {}
        for member in cast.members:
            if member.source.layers is not None:
                first, stop = member.source.layers
                lengths[stop - first] = member.source.line
        if len(lengths) > 1:
            raise at_line(
                max(lengths.values()),
                f"the sources of a slice have {' and '.join(map(str, lengths))} layers; as many "
                "are needed of each",
            )
        if not lengths:
            return [None] * len(casts)
        length = next(iter(lengths))
        spans.append((at, at + length))
        at += length
    return spans


def check_filters(
    cast: Cast, span: Span | None, own: Sequence[str], above: Sequence[Settings]
) -> None:
    """Raise `ConfigError` for a filter with a layer's number where a model's layers move.

    mergekit looks for it in the model's name of a tensor, which is then not OUT's.
    """
    for member in cast.others:
        layers = member.source.layers
        if span is None or layers is None or layers[0] == span[0]:
            continue
        for settings in (member.source.settings, cast.part.settings, *above):
            for key in own:
                listed = settings[key].value if key in settings else None
                for entry in listed if isinstance(listed, list) else ():
                    word = entry.value.get("filter") if isinstance(entry.value, dict) else None
                    if word is not None and _NUMBER.search(str(word.value)):
                        raise at_line(
                            word.line,
                            f"filter {word.value!r} of {key} is a layer of the model, which is "
                            "another of OUT; give the value in the slice's parameters",
                        )


def column(casts: Sequence[Cast], number: int) -> list[Member]:
    """The members that make model ``number``, slice by slice."""
    return [cast.others[number] for cast in casts]


def pieces_of(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Members as a recipe's pieces; runs that follow one another in one model are one."""
    pieces: list[dict[str, Any]] = []
    for member in members:
        piece: dict[str, Any] = {"path": member.place}
        if member.adapter is not None:
            piece["adapter"] = member.adapter
        layers = member.source.layers
        if layers is not None:
            before = pieces[-1].get("layers", [-1, -1]) if pieces else [-1, -1]
            if pieces and pieces[-1] == {**piece, "layers": [before[0], layers[0]]}:
                pieces[-1]["layers"] = [before[0], layers[1]]
                continue
            piece["layers"] = list(layers)
        pieces.append(piece)
    return pieces


def filled_up(casts: Sequence[Cast], said: Sequence[Said]) -> tuple[list[Cast], list[Said]]:
    """As many models in each slice: those that are missing are there with a weight of 0.

    Raises `ConfigError` where a model of no weight would change the result.
    """
    most = max(len(cast.others) for cast in casts)
    whole, all_said = [], []
    for cast, one in zip(casts, said, strict=True):
        lacking = most - len(cast.others)
        if lacking and one.values["method"] not in _WEIGHTED:
            raise at_line(
                cast.part.line,
                f"{len(cast.others)} models in this slice, {most} in another; as many are needed",
            )
        idle = cast.base or cast.others[0]
        whole.append(replace(cast, others=cast.others + (idle,) * lacking))
        models = one.models + [{**one.models[0], "weight": 0.0}] * lacking
        all_said.append(replace(one, models=models))
    return whole, all_said


def combined(said: Sequence[Said], spans: Sequence[Span | None]) -> Said:
    """One recipe's values of those of each slice.

    Raises `ConfigError` for what is one for all tensors and differs.
    """
    models = [
        _one([one.models[number] for one in said], spans) for number in range(len(said[0].models))
    ]
    return Said(_one([one.values for one in said], spans), models)


def _one(parts: Sequence[Any], spans: Sequence[Span | None]) -> Any:
    if all(part == parts[0] for part in parts) and not _in_layers(parts[0]):
        return parts[0]
    if isinstance(parts[0], dict):
        keys = dict.fromkeys(key for part in parts for key in part)
        for key in keys:
            if not all(key in part for part in parts):
                raise ConfigError(f"{key} differs from slice to slice in kind; make them alike")
        return {key: _one([part[key] for part in parts], spans) for key in keys}
    numbers = [float(p) if isinstance(p, str) and _is_number(p) else p for p in parts]
    if all(isinstance(n, float | Gradient | Choices) for n in numbers):
        return over_slices(list(zip(numbers, spans, strict=True)))
    raise ConfigError(f"{parts[0]} and {parts[1]} in different slices; one is needed for all")


def _in_layers(part: Any) -> bool:
    """Whether a value depends on which of the slice's layers a tensor is in."""
    if isinstance(part, dict):
        return any(_in_layers(one) for one in part.values())
    return isinstance(part, Gradient | Choices)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
