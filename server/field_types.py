"""Types of the run config's fields: lists and numbers as Flower has them, names of a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from dare_agg.deploy.devices import parse_device
from dare_agg.rounds.terms import check_choice


def split_words(value: Any) -> Any:
    # Flower's run config holds scalars only: lists come as comma-separated text.
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


Words = Annotated[tuple[str, ...], BeforeValidator(split_words)]


def _as_typed(value: Any) -> Any:
    # -c drop-rate=0.99 and -c 'drop-rate="0.99"' are the same: a float's repr is what was typed.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return repr(value) if number else value


NumberText = Annotated[str, BeforeValidator(_as_typed)]


@dataclass(frozen=True)
class OneOf:
    """A check for the names of a table."""

    what: str
    known: tuple[str, ...]

    def __call__(self, value: str) -> str:
        check_choice(self.what, value, self.known)
        return value


def one_of(what: str, known: Iterable[str]) -> AfterValidator:
    """A validator for the names of a table."""
    return AfterValidator(OneOf(what, tuple(known)))


def known_device(word: str) -> str:
    """The word of a device, as it was given; raises `ConfigError` for what is none."""
    parse_device(word)
    return word
