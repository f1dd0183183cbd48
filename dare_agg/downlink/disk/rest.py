"""What rounding and coding left of the changes so far, in one byte a parameter.

The byte is the upper one of a float16 (sign, 5 bits of exponent, 2 of mantissa) in units of 256
grid steps, rounded to nearest even: from 1/256 of a step to 14.7 million steps, two significant
bits and a hidden one. What the byte cannot hold of the rest is lost, without a bias.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dare_agg.downlink.grid import Factors
from dare_agg.vectors.layout import FloatVector

Codes = NDArray[np.uint8]

# Steps that a code's 1 stands for.
_UNIT = 256.0
_LARGEST = 57344.0
_HALVES = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float64)
# Infinities and what is no number are never written.
_STEPS = np.where(np.isfinite(_HALVES), _HALVES, 0.0) * _UNIT
_HALF = np.uint16(0x7F)


def rest_values(codes: Codes, factors: Factors) -> FloatVector:
    """What codes stand for, float32, where 1 is ``factors`` grid steps."""
    return (_STEPS.take(codes) / factors).astype(np.float32)


def rest_codes(rest: FloatVector, factors: Factors) -> Codes:
    """The codes of a rest; beyond what they hold, the largest."""
    units = rest * (factors / _UNIT)
    np.clip(units, -_LARGEST, _LARGEST, out=units)
    bits = units.astype(np.float16).view(np.uint16)
    bits += _HALF + ((bits >> 8) & 1)
    return (bits >> 8).astype(np.uint8)
