"""What a run whose rounds choose their own terms keeps between them (`dare_agg.rounds.auto`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.budget import ClientTerms
from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import DropRate
from dare_agg.errors import ConfigError, StateError

NAMES = ("auto.terms", "auto.loud")


@dataclass(frozen=True)
class AutoState:
    """What a run with ``drop_rate="auto"`` keeps from round to round.

    ``wanted`` are the next round's terms, None before the first; ``loud`` is how much of what a
    model bears the last round's noise was; ``told`` says that the warning was given.
    """

    wanted: ClientTerms | None = None
    loud: float = 0.0
    told: bool = False

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """The state as named arrays; none before the first round."""
        if self.wanted is None:
            return {}
        rate, code = self.wanted.drop_rate, VALUE_FORMATS[self.wanted.values].code
        terms = [rate.numerator, rate.denominator, code, int(self.told)]
        return dict(zip(NAMES, (np.array(terms, np.int64), np.array([self.loud])), strict=True))


def auto_from_arrays(arrays: Mapping[str, NDArray[np.generic]]) -> AutoState:
    """Read back what `AutoState.to_arrays` gave; raises `StateError` for what is not that."""
    terms, loud = (arrays.get(name) for name in NAMES)
    if terms is None and loud is None:
        return AutoState()
    wrong = "server step state has no valid 'auto'; resume from an older round"
    if terms is None or terms.shape != (4,) or terms.dtype != np.int64:
        raise StateError(wrong)
    if loud is None or loud.shape != (1,) or loud.dtype != np.float64 or not loud[0] >= 0:
        raise StateError(wrong)
    num, den, code, told = (int(number) for number in terms)
    names = {row.code: row.name for row in VALUE_FORMATS.values()}
    try:
        wanted = ClientTerms(DropRate(num, den), names[code])
    except (ConfigError, KeyError) as error:
        raise StateError(wrong) from error
    return AutoState(wanted, float(loud[0]), bool(told))
