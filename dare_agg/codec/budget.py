"""From an upload budget to a drop rate and a value format.

Of all formats that fit, each at the lowest drop rate that fits, the one of least expected
error (1 + v)/(1 − p) − 1 is taken (v the format's own error): few bits first, then a higher
drop rate. Updates of every drop rate and format are unbiased, so clients with budgets of
their own mix in one round.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import DropRate
from dare_agg.codec.payload import payload_bytes
from dare_agg.codec.update_header import HEADER_BYTES
from dare_agg.errors import BudgetError, ConfigError

# Above this stride (p = 0.9999) rounds of tens of clients were seen to break down.
MAX_BUDGET_STRIDE = 10_000
_FINE_STRIDE = 10
_SMALLEST = min(VALUE_FORMATS.values(), key=lambda row: row.bits).name
_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9,
    "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """What fits: ``bytes`` of one update, header included.

    ``nmse`` is the expected squared error of one client's update relative to its squared
    delta, ``mean_nmse`` that of the mean over the clients where their deltas are equal and
    their masks are independent (masks rotated by rank do better).
    """

    drop_rate: DropRate
    values: str
    bytes: int
    nmse: float
    mean_nmse: float

    @property
    def terms(self) -> ClientTerms:
        """Drop rate and value format that fit, as a client's terms."""
        return ClientTerms(self.drop_rate, self.values)


def parse_bytes(text: str | int) -> int:
    """Read a number of bytes such as 300000, "300kB" or "1.5 MiB".

    Raises `ConfigError` for anything else.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*", str(text))
    if isinstance(text, bool) or not found or found[2].lower() not in _UNITS:
        raise ConfigError(f"{text!r} is no number of bytes; for example 300kB or 2MiB")
    return int(Fraction(found[1]) * _UNITS[found[2].lower()])


def plan_budget(
    parameters: int,
    *,
    nbytes: int | None = None,
    seconds: float | None = None,
    kbit_s: float | None = None,
    clients: int = 1,
    mask: str = "stratified",
    max_stride: int = MAX_BUDGET_STRIDE,
) -> Budget:
    """Choose drop rate and value format for an update of ``parameters`` elements.

    The budget is ``nbytes``, or what ``kbit_s`` carries in ``seconds``, or the smaller of both.
    Raises `BudgetError` where not even the fewest bits at a stride of ``max_stride`` fits.
    """
    if (seconds is None) != (kbit_s is None):
        raise ConfigError("a budget in time needs both seconds and kbit_s")
    if nbytes is None and seconds is None:
        raise ConfigError("a budget needs nbytes, or seconds and kbit_s")
    for name, value in (("seconds", seconds), ("kbit_s", kbit_s), ("nbytes", nbytes)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} = {value}; a finite number above 0 is needed")
    if parameters < 1 or clients < 1:
        raise ConfigError(f"{parameters} parameters, {clients} clients; at least 1 of each")
    room = min(
        math.inf if nbytes is None else nbytes,
        math.inf if seconds is None or kbit_s is None else seconds * kbit_s * 125,
    )
    found = [
        budget
        for name in VALUE_FORMATS
        if (budget := _fit(name, parameters, room, clients, mask, max_stride)) is not None
    ]
    if not found:
        least = _budget(_SMALLEST, parameters, DropRate(max_stride, 1), clients, mask)
        raise BudgetError(
            f"{room:.0f} bytes are too few for an update of {parameters} parameters; at least "
            f"{least.bytes} are needed ({least.values}, drop rate {least.drop_rate}): allow more "
            "bytes or time"
        )
    return min(found, key=lambda b: (b.nmse, VALUE_FORMATS[b.values].bits))


def _fit(
    name: str, parameters: int, room: float, clients: int, mask: str, max_stride: int
) -> Budget | None:
    """The format at the lowest drop rate that fits."""
    # Strides go up in steps of 1/32 below 10 and of 1 from there: equal strata are drawn faster.
    stride = max(Fraction(1), Fraction(VALUE_FORMATS[name].bits * parameters) / (8 * int(room) + 1))
    while stride <= max_stride:
        steps = 32 if stride < _FINE_STRIDE else 1
        stride = Fraction(math.ceil(stride * steps), steps)
        rate = DropRate(stride.numerator, stride.denominator)
        budget = _budget(name, parameters, rate, clients, mask)
        if budget.bytes <= room:
            return budget
        # At most a few steps: all but the header, the scales and the rest is accounted for.
        stride = max(stride + Fraction(1, steps), stride * budget.bytes / (int(room) + 64))
    return None


def _budget(name: str, parameters: int, rate: DropRate, clients: int, mask: str) -> Budget:
    survivors = -(-parameters * rate.denominator // rate.numerator)
    if mask == "bernoulli" and rate.numerator > 1:
        # The count is drawn too: five standard deviations of room.
        survivors = min(parameters, survivors + math.ceil(5 * math.sqrt(survivors)))
    # A rest of up to 31 float32 comes and goes with the count: the largest near it counts.
    size = max(payload_bytes(name, survivors - back) for back in range(min(32, survivors)))
    nmse = (1 + VALUE_FORMATS[name].nmse) / rate.keep - 1
    exact = payload_bytes(name, survivors) if mask == "stratified" else size
    return Budget(rate, name, HEADER_BYTES + exact, nmse, nmse / clients)


@dataclass(frozen=True)
class UploadBudget:
    """What clients of a run may upload a round, dense group included.

    ``nbytes`` holds for each client. Where ``seconds`` is set, a node that states its uplink
    sends no longer than that.
    """

    nbytes: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("nbytes", "seconds"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} = {value}; a finite number above 0 is needed")

    def terms(
        self, parameters: int, dense_bytes: int, kbit_s: float, *, mask: str
    ) -> ClientTerms | None:
        """One client's terms; None where nothing limits it (a node of unknown uplink).

        A node too slow for any update that is of use gets the smallest one; an ``nbytes``
        that fits nothing raises `BudgetError`.
        """
        timed = self.seconds is not None and kbit_s > 0
        if self.nbytes is None and not timed:
            return None
        chosen: Budget | None = None
        if self.nbytes is not None:
            chosen = plan_budget(parameters, nbytes=self._left(self.nbytes, dense_bytes), mask=mask)
        if timed:
            assert self.seconds is not None
            room = int(self.seconds * kbit_s * 125) - dense_bytes
            try:
                slow = plan_budget(parameters, nbytes=max(1, room), mask=mask)
            except BudgetError:
                slow = _budget(_SMALLEST, parameters, DropRate(MAX_BUDGET_STRIDE, 1), 1, mask)
            if chosen is None or slow.nmse > chosen.nmse:
                chosen = slow
        return chosen.terms if chosen else None

    def _left(self, nbytes: int, dense_bytes: int) -> int:
        if nbytes <= dense_bytes:
            raise BudgetError(
                f"an upload budget of {nbytes} bytes leaves nothing beside the {dense_bytes} of "
                "dense tensors and directions; allow more, or send those in fewer bits "
                f"(dense-values = {_SMALLEST}) or fewer of them"
            )
        return nbytes - dense_bytes


@dataclass(frozen=True)
class ClientTerms:
    """What one client was given of its own: a drop rate and a value format."""

    drop_rate: DropRate
    values: str
