"""Drop rate and value format that the rounds themselves choose: ``drop_rate="auto"``.

The server knows each client's ‖δ‖, what its terms add to it (`dare_agg.rounds.noise`), how far the
merge moved the model, and the model. After each round it takes the cheapest terms of a table
whose noise, predicted from that round, fills at most `STAY` of both bounds:

- `QUIET` of ‖W‖, since training from scratch takes harm from more;
- `OF_CHANGE` times the merged change, since more no longer averages out over the rounds.

While the terms at hand keep the bounds and none is cheaper by that margin, they stay. What a
client says of its norm counts for at most `NEAR` times the clients' median, and at least for one
`NEAR`-th of it; whatever is said, terms are those of the table.

A run begins with what needs no knowledge: small models send every value, adapters in one bit, and
large models drop nine tenths.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dare_agg.codec.budget import ClientTerms
from dare_agg.codec.formats import find_values
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.payload import payload_bytes
from dare_agg.codec.update_header import HEADER_BYTES
from dare_agg.rounds.auto_state import AutoState
from dare_agg.rounds.noise import LOUD, QUIET, error_of
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.vectors.layout import Layout

AUTO = "auto"
# At p = .9 in one bit noise is 3.8 times the change of clients that have nothing in common, and no
# table shows a loss by it; at p = .99 it is up to 12 times, which text bears and images hardly, at
# .999 40 times, which ends below FedAvg (docs/RESULTS.md). No terms of the table are above .9: from
# there on the noise hides how far clients agree.
OF_CHANGE = 4.0
# Terms next to each other in the table differ by 1.4 times the noise or more.
STAY = 0.7
NEAR = 4.0
# Up to here every value travels: in four bits half a megabyte.
SMALL = 1 << 20
_WHOLE = parse_drop_rate(0)
_LARGE = tuple(map(parse_drop_rate, ("0.9", "0.8", "0.5", "0")))


@dataclass(frozen=True)
class Choices:
    """The terms that a run may choose of, cheapest first, and those it begins with."""

    every: tuple[ClientTerms, ...]
    first: ClientTerms


def choices(layout: Layout, values: str = AUTO, *, compared: bool = False) -> Choices:
    """What the updates of a delta group may be.

    ``values`` other than "auto" is the format that they all have; ``compared`` is for strategies
    that hold updates against each other, and bear no drop.
    """
    if values != AUTO:
        find_values(values)
    adapters = any("lora_" in name for name in layout.names)
    small = layout.size <= SMALL
    rates = (_WHOLE,) if adapters or small or compared else _LARGE
    if values != AUTO:
        every = [ClientTerms(rate, values) for rate in rates]
    elif compared:
        every = [ClientTerms(_WHOLE, name) for name in ("b4", "i8")]
    elif adapters:
        every = [ClientTerms(_WHOLE, "b1")]
    else:
        # At equal bits fewer bits a value make less noise than a lower drop rate.
        every = [ClientTerms(rate, "b1") for rate in rates if rates is _LARGE]
        every += [ClientTerms(_WHOLE, name) for name in ("b2", "b4", "i8")]
    first = every[0]
    if small and not adapters and values == AUTO:
        first = ClientTerms(_WHOLE, "b4")
    return Choices(tuple(every), first)


def terms_bytes(terms: ClientTerms, size: int) -> int:
    """Bytes of an update of ``size`` elements at these terms, its header included."""
    return HEADER_BYTES + payload_bytes(terms.values, terms.drop_rate.survivors(size))


def terms_words(terms: ClientTerms) -> str:
    """Terms as `DareStrategy`'s words."""
    return f'drop_rate={terms.drop_rate}, values="{terms.values}"'


def within(wanted: ClientTerms, allowed: ClientTerms | None, size: int) -> ClientTerms:
    """What is wanted where it takes no more bytes than what a budget allows, else that."""
    if allowed is None or terms_bytes(wanted, size) <= terms_bytes(allowed, size):
        return wanted
    return allowed


@dataclass(frozen=True)
class Judged:
    """What a round tells of the next one's noise: all norms are of what moves the model.

    ``spread`` is the noise of terms whose error is 1, ``size`` ‖W‖ (None where noise cannot be
    held against it), ``change`` what the clients' changes have in common (None where unknown),
    ``error`` that of the round's own terms.
    """

    spread: float
    size: float | None
    change: float | None
    error: float

    def of_weights(self, error: float) -> float | None:
        """The noise of terms of this error relative to ‖W‖."""
        return self.spread * math.sqrt(error) / self.size if self.size else None

    def of_change(self, error: float) -> float | None:
        """The noise of terms of this error relative to the merged change."""
        return self.spread * math.sqrt(error) / self.change if self.change else None

    def filled(self, error: float, *, quiet: float = QUIET) -> float:
        """How much of the nearer bound terms of this error fill."""
        parts = ((self.of_weights(error), quiet), (self.of_change(error), OF_CHANGE))
        return max((noise / bound for noise, bound in parts if noise is not None), default=0.0)


def judge(
    norms: Sequence[float],
    weights: Sequence[float],
    errors: Sequence[float],
    settings: FederatedSettings,
    size: float | None,
    merged: float | None,
) -> Judged | None:
    """Judge a round by its clients' ‖δ‖, weights and terms' errors, in one order.

    ``size`` is ‖W‖ and ``merged`` the norm of the merged change, None where either is unknown.
    None where nothing is known: most clients told no number, or moved nothing.
    """
    told = near_median(norms)
    if told is None:
        return None
    scale = abs(settings.scaling)
    parts = [scale * weight * norm for weight, norm in zip(weights, told, strict=True)]
    squares = [part * part for part in parts]
    spread = math.sqrt(math.fsum(squares))
    if not (math.isfinite(spread) and spread > 0):
        return None
    error = math.fsum(s * e for s, e in zip(squares, errors, strict=True)) / math.fsum(squares)
    change = None
    if settings.shared_mask:
        # One mask for all: their noises add up as their changes do.
        spread = math.fsum(parts)
        if merged is not None and math.isfinite(merged):
            spread = change = min(spread, max(merged / math.sqrt(1 + error), 1e-9 * spread))
    elif merged is not None and math.isfinite(merged):
        # Changes that have nothing in common still add up as noise does.
        change = math.sqrt(max(merged**2 - spread**2 * error, math.fsum(squares)))
    step = settings.server_step
    moves = step.numbers["lr"] if step.name in ("plain", "momentum") else 1.0
    return Judged(
        spread * moves,
        size if step.name in ("plain", "momentum") else None,
        None if change is None else change * moves,
        error,
    )


def near_median(norms: Sequence[float]) -> list[float] | None:
    """Norms within `NEAR` of their median; one that is no norm counts as the median.

    None where the median is no norm above 0.
    """
    known = [norm if math.isfinite(norm) and norm >= 0 else math.nan for norm in norms]
    good = [norm for norm in known if norm == norm]
    if len(good) * 2 <= len(known):
        return None
    middle = statistics.median_low(good)
    if middle <= 0:
        return None
    return [
        middle if norm != norm else min(max(norm, middle / NEAR), middle * NEAR) for norm in known
    ]


def next_terms(found: Choices, now: ClientTerms, judged: Judged | None) -> ClientTerms:
    """The terms of the next round, of those that this one wanted."""
    if judged is None or now not in found.every:
        return now
    if judged.size is None and judged.change is None:
        return now
    place, wanted = found.every.index(now), enough(found, judged)
    cheaper = found.every.index(wanted) < place
    return wanted if cheaper or judged.filled(_error(now)) > 1 else now


def enough(found: Choices, judged: Judged) -> ClientTerms:
    """The cheapest terms that keep the bounds by a margin, the finest where none does."""
    fits = (terms for terms in found.every if judged.filled(_error(terms)) <= STAY)
    return next(fits, found.every[-1])


def _error(terms: ClientTerms) -> float:
    return error_of(terms.drop_rate, terms.values)


def heard(state: AutoState, judged: Judged | None) -> tuple[AutoState, bool]:
    """Take a round's noise; returns whether two rounds in a row are too loud together, once."""
    now = judged.filled(judged.error, quiet=LOUD) if judged is not None else 0.0
    loud = math.sqrt(now * state.loud) > 1 and not state.told
    return replace(state, loud=now, told=state.told or loud), loud
