"""The table of value formats: how the survivors of an update are written as bytes.

========  ====  =========================================================================
name      bits  rule
========  ====  =========================================================================
f32       32    IEEE 754 binary32
f16       16    IEEE 754 binary16, nearest
bf16      16    the upper half of binary32, nearest even
i8        8     per block ⌊x·127/max|x| + dither⌋, unbiased
b4 b2     4 2   rotated, nearest Gaussian level, one unbiased scale a block
b1        1     rotated, sign, one unbiased scale a block
========  ====  =========================================================================

A payload holds the codes of all survivors in order, then one float32 scale a block, then
(formats with blocks only) the unrotated rest as float32. Everything that is particular to a
format stands in its row. Nothing here depends on libm, BLAS or a library's random generator.
"""

from __future__ import annotations

from dare_agg.codec import i8_format, plain_formats, rotated_formats
from dare_agg.codec.value_format import ValueFormat
from dare_agg.errors import ConfigError, did_you_mean

VALUE_FORMATS: dict[str, ValueFormat] = {
    row.name: row for row in (*plain_formats.ROWS, i8_format.ROW, *rotated_formats.ROWS)
}


def find_values(name: str) -> ValueFormat:
    """Return the row of a value format; an unknown name raises `ConfigError`."""
    if name not in VALUE_FORMATS:
        raise ConfigError(f"value format {name!r} is unknown{did_you_mean(name, VALUE_FORMATS)}")
    return VALUE_FORMATS[name]
