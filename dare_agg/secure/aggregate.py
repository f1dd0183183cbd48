"""What a secure aggregate is: one row of `dare_agg.secure.aggregates.AGGREGATES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ProtocolError
from dare_agg.secure.stream import MAX_WORD_BITS, Words
from dare_agg.vectors.layout import FloatVector

MIN_BITS, MAX_BITS = 4, 24
# After the values: a party's weight and the share of its values that were clipped.
TRAILER_WORDS = 2


class FixedPoint(Protocol):
    """How values become integers (`dare_agg.secure.packing.Quantiser` is one)."""

    @property
    def bits(self) -> int:
        """Bits of a value's magnitude."""

    @property
    def clip(self) -> float:
        """The largest magnitude; more is cut off."""

    @property
    def carry(self) -> int:
        """Bits that the sum over all parties adds."""

    @property
    def parties(self) -> int:
        """How many parties may add up."""

    @property
    def reach(self) -> int:
        """The largest magnitude of their sum, noise with it."""

    @property
    def top(self) -> int:
        """The integer that stands for ``clip``."""

    @property
    def word_bits(self) -> int:
        """Bits of a word: all fields of a value with room for their sums."""


@dataclass(frozen=True)
class Sums:
    """What a secure sum reveals: integers, over the survivors of the parties that stayed.

    ``total`` is Σ τ, ``fields`` what else the aggregate sums, by name. The weight is in units
    of 1/top, the clipped share too.
    """

    parties: int
    total: NDArray[np.int64]
    weight: int
    clipped: int
    fields: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    def part(self, start: int, stop: int) -> Sums:
        """The sums of some of the values; weight and clipped share stay."""
        cut = slice(start, stop)
        fields = {name: values[cut] for name, values in self.fields.items()}
        return Sums(self.parties, self.total[cut], self.weight, self.clipped, fields)


@dataclass(frozen=True)
class SecureMeasurements:
    """What the secure round reports; ``lone_share`` is the share of elements with exactly one
    contributor on a side (TIES: that party's value shows, unattributed)."""

    parties: int
    clipped_share: float
    lone_share: float | None = None
    conflict_share: float | None = None


class Rule(NamedTuple):
    """A way to read sums, as unscaled float32.

    ``method`` is the word that asks a run for it ("" for none), which may weigh the parties by
    examples where ``weighed``.
    """

    read: Callable[[Sums, FixedPoint], FloatVector]
    method: str = ""
    weighed: bool = False


@dataclass(frozen=True)
class Aggregate:
    """One row: how integers become the words of a secure sum, and what its sums say.

    Attributes
    ----------
    name, code, title
        the word in terms and policies, the number on the wire, the name in text.
    least_bits
        fewer, and rounding drowns what small deltas say.
    word_bits
        of a value of ``bits`` bits whose sum needs ``carry`` more.
    pack
        a party's integers, the trailer's at the end, as words.
    unpack
        words summed over so many parties; refuses what honest ones cannot add up to.
    rules
        how sums may be read; the first is the aggregate's own.
    dense
        how those of a dense part are read.
    weighable
        whether parties may count for more or less than one.
    usual_bits
        of a value where a run says none.
    sketches
        whether parties add sketches of their Gram matrices (`dare_agg.secure.sketch`).
    noised
        whether parties add noise (`dare_agg.secure.private`).
    shares
        (lone, conflict) of `SecureMeasurements`.
    """

    name: str
    code: int
    title: str
    least_bits: int
    word_bits: Callable[[int, int], int]
    pack: Callable[[NDArray[np.int64], FixedPoint], NDArray[np.generic]]
    unpack: Callable[[Words, FixedPoint, int], Sums]
    rules: Mapping[str, Rule]
    dense: Callable[[Sums, FixedPoint], FloatVector]
    weighable: bool = False
    usual_bits: int = 16
    sketches: bool = False
    noised: bool = False
    shares: Callable[[Sums], tuple[float | None, float | None]] = lambda sums: (None, None)

    def most_bits(self, carry: int) -> int:
        """The most bits of a value that leave room in a word, 0 for none."""
        fitting = (b for b in range(MAX_BITS + 1) if self.word_bits(b, carry) <= MAX_WORD_BITS)
        return max(fitting, default=0)


def bound(values: NDArray[np.int64], most: int, what: str) -> None:
    """Raise `ProtocolError` "words" for a sum above what honest parties add up to."""
    if values.size and int(values.max()) > most:
        raise bad_words(f"a {what} of {int(values.max())}, at most {most} is possible")


def bad_words(why: str) -> ProtocolError:
    """The error for a sum that no honest parties add up to; ``why`` names what is wrong with it."""
    return ProtocolError(
        f"the unmasked sum is malformed: {why}; a party sent bad words or was shown another "
        "round: nothing was merged",
        reason="words",
    )
