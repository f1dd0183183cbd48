"""What an offline merge is asked to do: one checked object for command line and files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PlainValidator,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from dare_agg.checkpoint.hub import located_all
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.merge.methods import find_method
from dare_agg.merge.row import Method
from dare_agg.offline.chat_template import check_template
from dare_agg.offline.parameters import (
    Choices,
    Gradient,
    Parameter,
    ParameterField,
    numbers_of,
    parse_parameter,
    plain_parameter,
)
from dare_agg.vectors.patterns import compile_patterns

# In the place of a folder: OUT has BASE's tokenizer.
BASES_TOKENIZER = "base"
# Sparsifiers that restore a tensor's norm after a random drop, as mergekit does.
MERGEKIT_NORMS = {"mergekit-dare": "l1", "mergekit-dare-l2": "l2", "mergekit-dare-linf": "linf"}


def _kebab(name: str) -> str:
    return name.replace("_", "-")


# A drop rate is kept as its decimals, which say exactly what is meant.
Rate = str | Gradient | Choices


def _rate(value: Any) -> Any:
    """One model's drop rate; a list is a gradient over its layers."""
    if value is None or isinstance(value, Gradient | Choices):
        return value
    if isinstance(value, list | tuple | Mapping):
        parameter = parse_parameter(value)
        for number in numbers_of(parameter):
            if not 0 <= number <= 1:
                raise ValueError(f"drop rate {number:g} is outside [0, 1]; for example 0.9")
        return parameter
    parse_drop_rate(str(value))
    return str(value)


def _rates(value: Any) -> Any:
    """The models' drop rates: one for all, a list with one for each, or one by tensor."""
    if isinstance(value, list | tuple) and not any(isinstance(v, Mapping) for v in value):
        return tuple(_rate(one) for one in value)
    return _rate(value)


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=_kebab, populate_by_name=True
    )


def _own_options(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError("options are written {density: 0.5}")
    return {str(name): parse_parameter(one) for name, one in value.items()}


def _plain_options(value: Mapping[str, Parameter]) -> dict[str, Any]:
    return {name: plain_parameter(one) for name, one in value.items()}


class Piece(_Strict):
    """Layers [first, stop) of a model, or without ``layers`` all of it; with ``adapter``, after
    that was added to it."""

    path: Path
    adapter: Path | None = None
    layers: tuple[NonNegativeInt, PositiveInt] | None = None

    @model_validator(mode="after")
    def _has_layers(self) -> Piece:
        if self.layers and self.layers[0] >= self.layers[1]:
            raise ValueError(f"layers {list(self.layers)} are none; [first, stop] is needed")
        return self


def _one_after_another(pieces: list[Piece]) -> list[Piece]:
    if len(pieces) > 1 and not all(piece.layers for piece in pieces):
        raise ValueError("of several pieces each has layers: [first, stop]")
    return pieces


# A model that is put together of others' layers (`dare_agg.offline.stacks`).
Pieces = Annotated[list[Piece], AfterValidator(_one_after_another)]


class ModelInput(_Strict):
    """One model: where it is, its weight, and what else travels with it.

    With ``adapter`` it is ``path`` after that adapter was added to it, with ``pieces`` the layers
    of these, with the tokenizer of ``path``.
    Numbers may be parameters (`dare_agg.offline.parameters`); a plain list is a gradient.
    """

    path: Path
    adapter: Path | None = None
    pieces: Pieces = Field(default_factory=list)
    weight: ParameterField | None = None
    drop_rate: Annotated[Any, PlainValidator(_rate), PlainSerializer(plain_parameter)] = None
    seed: int | None = None
    statistics: Path | None = None
    options: Annotated[
        dict[str, Parameter], PlainValidator(_own_options), PlainSerializer(_plain_options)
    ] = Field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.path) if self.adapter is None else f"{self.path}+{self.adapter}"


class Rule(_Strict):
    """Scaling or weights of the tensors whose names match a regular expression."""

    match: str
    scaling: float | None = None
    weights: list[float] | None = None


class Recipe(_Strict):
    """A merge. ``rules`` apply in order, the last match wins. With ``base-pieces`` the base's
    layers are theirs, its configuration and tokenizer those of ``base``.
    ``order`` is that in which models are added, which decides the last bits of float32 sums.

    A plain list is one number for each model in ``drop-rate`` and in options that are per model,
    else a gradient; ``{gradient: […]}`` is one everywhere.
    """

    base: Path
    base_pieces: Pieces = Field(default_factory=list)
    models: list[ModelInput] = Field(min_length=1)
    method: str
    scaling: ParameterField = 1.0
    options: dict[str, Any] = Field(default_factory=dict)
    drop_rate: Annotated[Any, PlainValidator(_rates), PlainSerializer(plain_parameter)] = None
    seed: int = 0
    sparsifier: Literal[
        "dare", "drop-only", "magnitude", "mergekit-dare", "mergekit-dare-l2", "mergekit-dare-linf"
    ] = "dare"
    mask: Literal["stratified", "bernoulli"] = "stratified"
    exclude: list[str] = Field(default_factory=list)
    rules: list[Rule] = Field(default_factory=list)
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    tokenizer: str | None = None
    vocabulary: Literal["base", "union"] | None = None
    chat_template: Annotated[str, AfterValidator(check_template)] | None = None
    order: Literal["contents", "given"] = "contents"

    @field_validator("models", mode="before")
    @classmethod
    def _paths_are_models(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"path": v} if isinstance(v, str | Path) else v for v in value]
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        row = self.row
        common = settled_options(row, self.options)
        for model in self.models:
            settled_options(row, {**common, **model.options}, own=True)
        if isinstance(self.drop_rate, tuple) and len(self.drop_rate) != len(self.models):
            raise ConfigError(
                f"drop-rate has {len(self.drop_rate)} values for {len(self.models)} models; give "
                "one for all, one for each, or {gradient: [...]} over the layers"
            )
        compile_patterns([*self.exclude, *(rule.match for rule in self.rules)])
        given = [model.statistics is not None for model in self.models]
        if row.statistics and not all(given):
            raise ConfigError(
                f"{row.name} needs a statistics file for each of the {len(given)} models, "
                f"{sum(given)} are given; make them with dare-agg statistics"
            )
        if any(given) and not row.statistics:
            raise ConfigError(f"{row.name} takes no statistics; fisher and regmean do")
        if self.vocabulary and row.statistics:
            raise ConfigError(
                f"vocabulary {self.vocabulary} with {row.name}: statistics have the rows of their "
                "own models' tokens; take another method, or exclude embeddings and heads"
            )
        weighted = [model.weight is not None for model in self.models]
        if any(weighted) and not all(weighted):
            raise ConfigError(f"{sum(weighted)} of {len(weighted)} models have a weight; give all")
        for rule in self.rules:
            if rule.weights is not None and len(rule.weights) != len(self.models):
                raise ConfigError(
                    f"rule {rule.match!r} has {len(rule.weights)} weights for "
                    f"{len(self.models)} models"
                )
        return self

    @cached_property
    def row(self) -> Method:
        """The method's row; a recipe of an unknown method does not exist."""
        return find_method(self.method)

    def rate_of(self, number: int) -> Rate | None:
        """The drop rate of the model named as number ``number``: its own, or the recipe's."""
        own = self.models[number].drop_rate
        if own is not None:
            return own
        return self.drop_rate[number] if isinstance(self.drop_rate, tuple) else self.drop_rate

    def with_files_located(self) -> Recipe:
        """The recipe with the paths of its base and models; those of a hub are downloaded."""
        base, models = located_models(self.base, self.models)
        pieces = _located_pieces(self.base_pieces)
        models = [m.model_copy(update={"pieces": _located_pieces(m.pieces)}) for m in models]
        return self.model_copy(update={"base": base, "base_pieces": pieces, "models": models})

    @property
    def is_of_whole_models(self) -> bool:
        """Whether the base is there to be counted from alone, and another gives the same."""
        return self.row.whole or self.options.get("of") == "models"

    @property
    def drops(self) -> bool:
        """Whether any delta is sparsified before the merge."""
        return any(self.rate_of(n) not in (None, "0", "0.0") for n in range(len(self.models)))

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain values, as it may stand in a file."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def located_models(base: Path, models: Sequence[ModelInput]) -> tuple[Path, list[ModelInput]]:
    """Return base and models with their paths; those of a hub are downloaded."""
    adapters = [model.adapter for model in models if model.adapter is not None]
    place, *places = located_all([base, *(model.path for model in models), *adapters])
    found = iter(places[len(models) :])
    return place, [
        model.model_copy(
            update={"path": path, "adapter": next(found) if model.adapter is not None else None}
        )
        for model, path in zip(models, places, strict=False)
    ]


def _located_pieces(pieces: Sequence[Piece]) -> list[Piece]:
    adapters = [piece.adapter for piece in pieces if piece.adapter is not None]
    found = located_all([*(piece.path for piece in pieces), *adapters])
    paths, rest = found[: len(pieces)], iter(found[len(pieces) :])
    return [
        piece.model_copy(update={"path": path, "adapter": piece.adapter and next(rest)})
        for piece, path in zip(pieces, paths, strict=True)
    ]


def settled_options(row: Method, given: Mapping[str, Any], *, own: bool = False) -> dict[str, Any]:
    """Options checked against the method's row; those by tensor as parameters.

    With ``own``, of one model, a list is a gradient even where the option is per model.
    Raises `ConfigError` for an unknown option, a number out of bounds, and a parameter where one
    number is needed.
    """
    settled = {}
    for name, value in given.items():
        option = row.options.get(name)
        listed = isinstance(value, list | tuple)
        by_tensor = isinstance(value, Gradient | Choices | Mapping) or (
            listed and (own or any(isinstance(v, Mapping) for v in value))
        )
        if option is None or not (
            by_tensor or (listed and option.by_tensor and not option.per_model)
        ):
            settled[name] = row.settle({name: value})[name]
            continue
        if not option.by_tensor:
            raise ConfigError(f"option {name} is one number for all tensors; give that")
        try:
            parameter = parse_parameter(value)
        except ValueError as error:
            raise ConfigError(f"option {name}: {error}") from error
        for number in numbers_of(parameter):
            option.check(name, number)
        settled[name] = parameter
    return settled


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Check values (kebab-case keys); raises `ConfigError` with a suggestion on one line."""
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            nested: dict[str, type[BaseModel]] = {
                "models": ModelInput, "rules": Rule, "base-pieces": Piece
            }  # fmt: skip
            model = nested.get(str(first["loc"][0]) if len(first["loc"]) > 1 else "", Recipe)
            known = [_kebab(name) for name in model.model_fields]
            key = str(first["loc"][-1])
            raise ConfigError(
                f"recipe key {where!r} is unknown{did_you_mean(key, known)}"
            ) from error
        if first["type"] == "literal_error":
            # In pydantic's words: 'dare', 'drop-only' or 'magnitude'
            known = re.findall(r"'([^']*)'", first["ctx"]["expected"])
            raise ConfigError(
                f"{where} {first['input']!r} is unknown{did_you_mean(str(first['input']), known)}"
            ) from error
        said = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"recipe {where or 'as a whole'}: {said} (got {str(first['input'])[:60]!r})"
        ) from error
