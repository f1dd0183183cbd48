"""What a run whose rounds choose their terms says and keeps of noise, and the next terms."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.budget import ClientTerms
from dare_agg.rounds.auto import (
    AUTO,
    OF_CHANGE,
    Choices,
    Judged,
    choices,
    enough,
    heard,
    next_terms,
    terms_bytes,
    terms_words,
)
from dare_agg.rounds.auto_state import AutoState
from dare_agg.rounds.noise import LOUD
from dare_agg.vectors.layout import Layout

# The sum of squares of each tensor's change in a round, made where it is asked for.
Squares = Callable[[], NDArray[np.float64]]


@dataclass
class Chooser:
    """The terms of a run whose rounds choose them; ``values`` is "auto" or the one format.

    ``compared`` is for strategies that hold updates against each other; ``limit`` names the word
    that bounds what clients send, "" where none does. ``log`` is told when the terms change.
    """

    called: str
    log: logging.Logger
    values: str = AUTO
    compared: bool = False
    limit: str = ""

    def choices(self, layout: Layout) -> Choices:
        """What the run may choose of."""
        return choices(layout, self.values, compared=self.compared)

    def wanted(self, layout: Layout, state: AutoState) -> ClientTerms:
        """The terms of the next round, before any client's budget."""
        found = self.choices(layout)
        return state.wanted if state.wanted in found.every else found.first

    def after(
        self,
        layout: Layout,
        state: AutoState,
        judged: Judged | None,
        measured: Mapping[str, Any],
        squares: Squares,
    ) -> tuple[AutoState, str]:
        """The state after a round, and what is to be warned of, "" for nothing."""
        found, now = self.choices(layout), self.wanted(layout, state)
        wanted = next_terms(found, now, judged)
        if wanted != now and judged is not None:
            self.log.info(
                "from round %d on: %s, since noise was %s",
                measured["round"] + 1,
                terms_words(wanted),
                noise_words(judged),
            )
        told, loud = heard(replace(state, wanted=wanted), judged)
        if not loud or judged is None:
            return told, ""
        return told, self._warning(layout, found, judged, measured, squares())

    def _warning(
        self,
        layout: Layout,
        found: Choices,
        judged: Judged,
        measured: Mapping[str, Any],
        squares: NDArray[np.float64],
    ) -> str:
        needed = enough(found, judged)
        nbytes = terms_bytes(needed, layout.size) + max(measured["dense_bytes"], default=0)
        remedy = {
            "upload_budget": f"an upload_budget of at least {nbytes} bytes",
            "client_terms": f"client_terms of at most that error: {terms_words(needed)}",
        }.get(self.limit, 'values="auto"')
        return (
            f"the noise of what is not sent is {noise_words(judged)}"
            f"{loudest_words(layout, squares)}: models end below "
            f"FedAvg's above {100 * LOUD:.0f} % and {OF_CHANGE:g} times; give {self.called} "
            f"{remedy}"
        )


def loudest_words(layout: Layout, squares: NDArray[np.float64]) -> str:
    """Which tensor has the most of a round's noise: its squares are most of the merged change's."""
    loudest, total = int(np.argmax(squares)), float(squares.sum())
    if not total:
        return ""
    return f", {100 * squares[loudest] / total:.0f} % of it in {layout.names[loudest]!r}"


def noise_words(judged: Judged) -> str:
    """A round's noise as people read it."""
    weights, change = judged.of_weights(judged.error), judged.of_change(judged.error)
    parts = [f"{100 * weights:.2g} % of the weights' own size"] if weights is not None else []
    parts += [f"{change:.2g} times the merged change"] if change is not None else []
    return " and ".join(parts)
