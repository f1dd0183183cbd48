"""What a value format is: one row of `dare_agg.codec.formats.VALUE_FORMATS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.kernels import compiled
from dare_agg.codec.rotation import GROUP
from dare_agg.errors import NonFiniteError
from dare_agg.vectors.layout import FloatVector

Bytes = NDArray[np.uint8]
# (values, keystream, room for the codes) -> (scales, rest)
Encode = Callable[[FloatVector, Bytes | None, Bytes], tuple[FloatVector, FloatVector]]
# (codes, scales, rest, room for the values, keystream)
Decode = Callable[[Bytes, FloatVector, FloatVector, FloatVector, Bytes | None], None]

# What training changes a parameter by is less by far: an update beyond it is refused.
MAX_UPDATE = np.float32(2.0**20)
# Statistics and steps are sums and rescaled: beyond this, more of that could overflow float32.
MAX_MAGNITUDE = np.float32(2.0**60)
NOTHING = np.empty(0, np.float32)


@dataclass(frozen=True)
class ValueFormat:
    """One row: all that payloads, budgets and wires need to know of a format.

    Attributes
    ----------
    name, code
        the word in plans and files, the number in headers.
    bits
        of a code.
    nmse
        the format's own expected squared error relative to the squared value; the error of
        an update at drop rate p is (1 + nmse)/(1 − p) − 1.
    encode_group, decode_group
        codes, scales and rest of up to `GROUP` survivors, and back.
    blocks
        whether there are scales and a rest, those of `dare_agg.codec.rotation`'s blocks.
    keystream_bytes
        of the values key, for so many survivors.
    check_codes
        refuses a group's codes from survivor number ``first`` on, where some are none or stand
        for more than the given magnitude.
    """

    name: str
    code: int
    bits: int
    nmse: float
    encode_group: Encode
    decode_group: Decode
    blocks: bool = False
    keystream_bytes: Callable[[int], int] = lambda count: 0
    check_codes: Callable[[Bytes, int, np.float32], None] | None = None

    def coder(self, count: int) -> tuple[Encode, Decode]:
        """Encoder and decoder of a group: compiled loops for a whole one, where they pay."""
        plain = self.encode_group, self.decode_group
        loops = compiled(count)
        return plain if loops is None or count < GROUP else loops.GROUPS.get(self.name, plain)


def check_magnitude(
    values: FloatVector, first: int, most: np.float32, what: str = "survivor"
) -> None:
    """Raise `NonFiniteError` unless all values are finite and at most ``most`` in magnitude."""
    if not values.size:
        return
    loops, bits = compiled(), int(most.view(np.uint32))
    if loops is not None and values.size == GROUP and loops.largest(values) <= bits:
        return
    # NaN fails every comparison, so it is caught too.
    if values.max() <= most and values.min() >= -most:
        return
    good = np.abs(values) <= most
    at = int(np.argmin(good))
    raise NonFiniteError(
        f"{what} number {first + at} is {values[at]:g}; only finite values of magnitude <= "
        f"{most:g} are allowed: check the training step (learning rate, overflow)"
    )


def joined(scales: list[FloatVector]) -> FloatVector:
    """The scales of all blocks of a group, as they are written."""
    return np.concatenate(scales).astype("<f4") if scales else NOTHING
