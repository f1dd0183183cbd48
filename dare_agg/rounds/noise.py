"""How loud a round's drop is beside the model's own weights, and what to do where it drowns them.

An update at drop rate p in a format of error v is unbiased with squared error ω‖δ‖²,
ω = (1 + v)/(1 − p) − 1 (`dare_agg.codec.budget`). The merged delta Σ wᵢ δ̂ᵢ therefore carries noise
of norm λ·√(Σ wᵢ² ωᵢ ‖δᵢ‖²) at most. Fine-tuning moves weights by a thousandth, and noise many
times the delta does no harm; training from scratch moves them by their own size, and the same
noise is the model. So it is compared with ‖W‖, not with the delta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import DropRate, parse_drop_rate
from dare_agg.codec.payload import payload_bytes
from dare_agg.codec.update_header import HEADER_BYTES
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.vectors.model import Groups
from dare_agg.vectors.tiled import AnyVector

# Measured on Flower's examples (docs/FLOWER_APP.md), as the geometric mean of two rounds in a row,
# since one loud round between quiet ones is made good: fine-tuning stays below 0.02, training from
# scratch that takes no harm up to 0.32, and what the drop ruins has 0.37 to 3 in its first two.
LOUD = 0.34
# What a remedy must bring the loudest round to.
QUIET = 0.1
_PIECE = 1 << 16
_RATES = tuple(map(parse_drop_rate, ("0.99", "0.98", "0.95", "0.9", "0.8", "0.5", "0")))
_FORMATS = ("b1", "b2", "b4", "i8")


def error_of(rate: DropRate, values: str) -> float:
    """ω of an update: its expected squared error relative to its squared delta."""
    return (1 + VALUE_FORMATS[values].nmse) / rate.keep - 1


def error_of_plan(plan: RoundPlan) -> float:
    """ω of a plan's update: by its tensors' rates and levels where it has such."""
    rates = plan.rates
    if rates is None or rates.table is None:
        return error_of(plan.drop_rate, plan.terms.values)
    num, den = rates.table.strides
    marks = np.frombuffer(rates.table.levels, np.uint8).astype(np.float64)
    size = np.where(num > 0, (4 + marks % 4) * 2.0 ** np.floor(marks / 4 - 42), 0)
    squares = np.square(size) * np.array(rates.sizes, np.float64)
    errors = (1 + VALUE_FORMATS[plan.terms.values].nmse) * num / den - 1
    total = squares.sum()
    return float((squares * errors).sum() / total) if total else 0.0


def round_noise(
    plans: Sequence[RoundPlan],
    delta_norms: Sequence[float],
    weights: Sequence[float],
    settings: FederatedSettings,
    groups: Groups,
    size: float,
) -> float | None:
    """Norm of a round's noise relative to ``size``, from each client's own ‖δ‖ and weight.

    ``size`` is ‖W‖ of the model the round began with, or ended with where that was zero. None
    where the noise cannot be judged, also since a client told a norm that is no number.
    """
    step = settings.server_step
    if not is_held_by_weights(settings, groups):
        return None
    squares = [
        (weight * norm) ** 2 * error_of_plan(plan)
        for plan, norm, weight in zip(plans, delta_norms, weights, strict=True)
    ]
    noise = abs(settings.scaling) * step.numbers["lr"] * math.sqrt(math.fsum(squares))
    return noise / size if math.isfinite(noise) and size > 0 else None


def is_held_by_weights(settings: FederatedSettings, groups: Groups) -> bool:
    """Whether noise can be held against ‖W‖.

    Adapters begin at zero, and the adaptive server steps rescale what they get.
    """
    adapters = any("lora_" in name for name in groups.layout.names)
    return not adapters and settings.server_step.name in ("plain", "momentum")


def norm_of(vector: AnyVector) -> float:
    """‖x‖ in float64."""
    pieces = (vector[lo : lo + _PIECE] for lo in range(0, vector.size, _PIECE))
    return math.sqrt(
        math.fsum(float(np.sum(np.square(piece), dtype=np.float64)) for piece in pieces)
    )


@dataclass(frozen=True)
class Remedy:
    """Terms whose noise the model bears, of the fewest bits."""

    drop_rate: DropRate
    values: str

    def nbytes(self, parameters: int) -> int:
        """Bytes of an update at these terms, its header included."""
        survivors = -(-parameters * self.drop_rate.denominator // self.drop_rate.numerator)
        return HEADER_BYTES + payload_bytes(self.values, survivors)

    def __str__(self) -> str:
        """As `DareStrategy`'s words."""
        return f'drop_rate={self.drop_rate}, values="{self.values}"'


def remedy(noise: float, rate: DropRate, values: str) -> Remedy | None:
    """The terms of fewest bits that bring a round's ``noise`` at these terms to `QUIET`.

    None where no drop and no format is to blame: these terms send all there is.
    """
    error = error_of(rate, values)
    found = [
        (VALUE_FORMATS[name].bits * Fraction(r.denominator, r.numerator), index, r, name)
        for index, (r, name) in enumerate((r, name) for r in _RATES for name in _FORMATS)
        if error > 0 and noise * math.sqrt(error_of(r, name) / error) <= QUIET
    ]
    if not found:
        return None
    *_, rate, values = min(found, key=lambda row: row[:2])
    return Remedy(rate, values)


class NoiseWatch:
    """Looks at the noise of round after round, and speaks once; ``loudest`` is what it speaks of.

    Two rounds in a row are loud together: their geometric mean is above `LOUD`.
    """

    def __init__(self) -> None:
        self.loudest = 0.0
        self._before = 0.0
        self._told = False

    def look(self, noise: float | None, plans: Sequence[RoundPlan]) -> Remedy | None:
        """Take a round's noise; returns the remedy when it is time to speak, once."""
        before, self._before = self._before, noise or 0.0
        if self._told or math.sqrt(before * self._before) <= LOUD:
            return None
        self.loudest = max(before, self._before)
        found = max(plans, key=error_of_plan)
        way = remedy(self.loudest, found.drop_rate, found.terms.values)
        self._told = way is not None
        return way
