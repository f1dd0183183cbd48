"""What sender and receiver of an update agree on before it is sent."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np

from dare_agg.codec.formats import find_values
from dare_agg.codec.mask import MASK_KINDS, DropRate, Mask
from dare_agg.codec.rates import TensorRates
from dare_agg.codec.value_format import MAX_UPDATE
from dare_agg.errors import ConfigError
from dare_agg.vectors.layout import FloatVector

CODEC_VERSION = 1
# With keep rates by tensor.
BY_TENSOR_VERSION = 2
MAX_CONTEXT_BYTES = 32


@dataclass(frozen=True)
class UpdateSpec:
    """All that sender and receiver of an update agree on beforehand.

    ``base`` and ``layout`` are hex fingerprints; ``context`` binds the update to a run, a
    round and a client (at most 32 bytes). ``rescale`` tells the receiver to multiply the
    survivors by 1/(1−p); without it they are added as they are (DropOnly, error feedback).
    ``most`` is the largest magnitude of a survivor: that of a parameter's change, where the update
    holds no statistics. ``rates`` are keep rates by tensor, of at most as many survivors as
    ``drop_rate`` gives, and one a tensor.
    """

    size: int
    drop_rate: DropRate
    mask: str
    mask_key: bytes
    values_key: bytes
    rank: int
    values: str
    base: str
    layout: str
    rescale: bool = True
    context: bytes = b""
    most: np.float32 = MAX_UPDATE
    rates: TensorRates | None = None

    def __post_init__(self) -> None:
        find_values(self.values)
        for name in ("base", "layout"):
            text = getattr(self, name)
            try:
                good = len(bytes.fromhex(text)) == 32
            except (ValueError, TypeError):
                good = False
            if not good:
                raise ConfigError(f"{name} fingerprint {text!r:.80} is not 64 hex digits")
        if len(self.context) > MAX_CONTEXT_BYTES:
            raise ConfigError(
                f"context of {len(self.context)} bytes; at most {MAX_CONTEXT_BYTES} are allowed"
            )
        for name in ("mask_key", "values_key"):
            if len(getattr(self, name)) != 16:
                raise ConfigError(f"{name} has {len(getattr(self, name))} bytes; 16 are needed")

    def draw_mask(self) -> Mask:
        """Return the mask of this update."""
        return Mask(self.mask, self.size, self.drop_rate, self.mask_key, self.rank, self.rates)

    def mask_digest(self) -> bytes:
        """8 bytes that stand for mask kind, key, rank and values key, and rates told beforehand."""
        text = struct.pack("<BI", MASK_KINDS.index(self.mask), self.rank)
        text += self.mask_key + self.values_key
        if self.rates is None:
            return hashlib.sha256(b"dare-agg mask 1\0" + text).digest()[:8]
        told = self.rates.known.to_bytes() if self.rates.told else b""
        return hashlib.sha256(b"dare-agg mask 2\0" + text + told).digest()[:8]

    @property
    def version(self) -> int:
        """The version of the format that the update is written in."""
        return CODEC_VERSION if self.rates is None else BY_TENSOR_VERSION

    @property
    def table_bytes(self) -> int:
        """Bytes of keep rates in front of the values."""
        return 0 if self.rates is None else self.rates.table_bytes

    @property
    def most_coded(self) -> np.float32:
        """``most`` as it bounds the coded values, which are divided by their tensor's scale."""
        if self.rates is None:
            return self.most
        return np.float32(self.most / np.float32(max(1.0, self.rates.known.largest_scale)))

    @property
    def most_survivors(self) -> int:
        """The most survivors that the update may have, known before it arrives."""
        if self.mask == "bernoulli":
            return self.size
        uniform = self.drop_rate.survivors(self.size)
        return uniform if self.rates is None else self.rates.most_survivors(uniform)

    def scale(self, values: FloatVector, first: int, *, down: bool) -> None:
        """Divide survivors from number ``first`` on by their tensor's scale, or multiply by it."""
        if self.rates is not None:
            self.rates.scale(values, first, down=down)
