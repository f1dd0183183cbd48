"""The tables of forms: of version steps on the wire, and of what a run may ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dare_agg.downlink.coded_forms import DARE, DENSE, UNION, on_any_mask
from dare_agg.downlink.lossless import LOSSLESS
from dare_agg.downlink.step_form import Families, StepForm
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.vectors.layout import FloatVector

STEP_FORMS: Mapping[str, StepForm] = {row.name: row for row in (UNION, DENSE, DARE, LOSSLESS)}


@dataclass(frozen=True)
class Form:
    """A row of `FORMS`: the steps' form and value format, and whether the rest is kept.

    Where a round's change and masks do not fit, the row named ``otherwise`` is taken: without
    any mask where the form needs them, and with ``only_masks`` where the change is other than 0
    off them.
    """

    step: StepForm
    values: str
    about: str
    feedback: bool = True
    only_masks: bool = False
    otherwise: str = ""

    def fits(self, families: Families) -> bool:
        """Whether a round with these masks can be sent so."""
        return bool(families) or not self.step.masked or not self.otherwise

    def bears(self, change: FloatVector, families: Families, sizes: Sequence[int]) -> bool:
        """Whether all of a change, of tensors of these sizes, lies where this form sends any."""
        if not self.only_masks:
            return True
        kept = (np.count_nonzero(change[at]) for at, _ in on_any_mask(families, sizes))
        return sum(kept) == np.count_nonzero(change)


FORMS: Mapping[str, Form] = {
    "auto": Form(
        UNION, "b1", "union-b1 while the step lies on the masks, else dense-b1",
        only_masks=True, otherwise="dense-b1",
    ),
    "union-b1": Form(
        UNION, "b1", "1-bit values on the union of the round's masks",
        otherwise="dense-b1",
    ),
    "union-i8": Form(
        UNION, "i8", "8-bit values on the union of the round's masks",
        otherwise="dense-i8",
    ),
    "union-f32": Form(
        UNION, "f32", "exact values on the union of the round's masks",
        otherwise="lossless",
    ),
    "dense-b1": Form(DENSE, "b1", "1-bit values of every parameter"),
    "dense-i8": Form(DENSE, "i8", "8-bit values of every parameter"),
    "dare-b1": Form(DARE, "b1", "unbiased DARE with 1-bit values", feedback=False),
    "lossless": Form(LOSSLESS, "f32", "the exact change on the grid"),
}  # fmt: skip


def find_form(name: str) -> Form:
    """Return a row of `FORMS`; an unknown name raises `ConfigError`."""
    if name not in FORMS:
        raise ConfigError(f"downlink {name!r} is unknown{did_you_mean(name, FORMS)}")
    return FORMS[name]
