"""A row of a table as a run config names it: "adam", or with numbers, "adam(beta1=0.9)"."""

from __future__ import annotations

import re

from dare_agg.errors import ConfigError

_CALL = re.compile(r"\s*([\w-]+)\s*(?:\((.*)\)\s*)?")


def read_call(what: str, text: str, example: str) -> tuple[str, dict[str, float]]:
    """The name and the numbers of ``text``; ``what`` it is and an ``example`` are for messages.

    Raises `ConfigError` for text of another form, and for what is no number or there twice.

    >>> read_call("server step", "adam(tau=1e-3)", "adam")
    ('adam', {'tau': 0.001})
    """
    call = _CALL.fullmatch(text)
    if call is None:
        raise ConfigError(f'{what} {text!r} cannot be read; write a name, or "{example}"')
    numbers: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in (call[2] or "").split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key in numbers:
            raise ConfigError(f"{what} {text!r}: {key} is given twice; give it once")
        try:
            numbers[key] = float(value)
        except ValueError as error:
            raise ConfigError(
                f"{what} {text!r}: {part!r} is no number; write {key or 'name'}=0.9"
            ) from error
    return call[1], numbers
