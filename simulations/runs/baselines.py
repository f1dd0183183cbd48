"""The field's other ways to send a delta, written after their papers, for comparison only.

Each is a function ``(vector, rng) -> (restored vector, payload bytes)``; the bytes are those
of a real payload (indices by `simulations.runs.golomb`), without message headers.

- ``fedpaq8``, ``fedpaq4``: QSGD's stochastic levels in buckets of 512, scaled by the largest
  magnitude (Alistarh et al. 2017; Reisizadeh et al. 2020).
- ``signsgd``: all signs and one scale, the mean magnitude (Bernstein et al. 2018).
- ``topk``: the largest entries as float16, Golomb-coded positions (Lin et al. 2018).
- ``stc``: the largest entries as sign × their mean magnitude, Golomb-coded positions; in rounds
  with feedback on both links (Sattler et al. 2019).
  With ``corrected`` the scale is ‖x‖²/⟨x, q⟩, so that one update alone, without rounds of
  feedback, has the right length along x (not for use with feedback).
- ``eden1``: rotated 1-bit values of *every* entry (Vargaftik et al. 2022).
- ``randk``: random entries as float32, seeded positions, rescaled (Konečný et al. 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.vectors.layout import FloatVector
from simulations.runs.golomb import encode_positions

BUCKET = 512
Rng = np.random.Generator
Sent = tuple[FloatVector, int]


def qsgd(vector: FloatVector, rng: Rng, *, bits: int) -> Sent:
    """Unbiased stochastic rounding to 2^(bits−1) − 1 levels a side, a float32 a bucket."""
    levels = np.float32((1 << (bits - 1)) - 1)
    padded = np.zeros(-(-vector.size // BUCKET) * BUCKET, np.float32)
    padded[: vector.size] = vector
    rows = padded.reshape(-1, BUCKET)
    scale = np.abs(rows).max(axis=1, keepdims=True) / levels
    scale[scale == 0] = 1
    noise = rng.random(rows.shape, dtype=np.float32)
    restored = np.floor(rows / scale + noise) * scale
    nbytes = -(-vector.size * bits // 8) + 4 * len(rows)
    return restored.ravel()[: vector.size], nbytes


def signsgd(vector: FloatVector, rng: Rng) -> Sent:
    """Sign of every entry times the mean magnitude."""
    scale = np.float32(np.abs(vector).mean(dtype=np.float64))
    return np.where(vector >= 0, scale, -scale).astype(np.float32), -(-vector.size // 8) + 4


def _largest(vector: FloatVector, keep: float) -> np.ndarray:
    count = max(1, round(vector.size * keep))
    sizes = np.abs(vector)
    return np.sort(np.argpartition(sizes, vector.size - count)[vector.size - count :])


def topk(vector: FloatVector, rng: Rng, *, keep: float) -> Sent:
    """The largest share ``keep`` of the entries, as float16."""
    at = _largest(vector, keep)
    restored = np.zeros_like(vector)
    restored[at] = vector[at].astype(np.float16)
    return restored, len(encode_positions(at, vector.size)) + 2 * at.size


def stc(vector: FloatVector, rng: Rng, *, keep: float, corrected: bool = False) -> Sent:
    """Sparse ternary compression: sign × mean magnitude of the largest entries."""
    at = _largest(vector, keep)
    restored = np.zeros_like(vector)
    magnitudes = np.abs(vector[at]).sum(dtype=np.float64)
    scale = magnitudes / at.size
    if corrected:
        energy = np.square(vector, dtype=np.float64).sum()
        scale = energy / magnitudes if magnitudes else 0.0
    restored[at] = np.sign(vector[at]) * np.float32(scale)
    return restored, len(encode_positions(at, vector.size)) + -(-at.size // 8) + 4


def eden1(vector: FloatVector, rng: Rng) -> Sent:
    """Rotated 1-bit values of every entry (the library's b1 with drop rate 0)."""
    return library(vector, rng, drop_rate="0", values="b1")


def randk(vector: FloatVector, rng: Rng, *, keep: float) -> Sent:
    """A seeded random share of the entries as float32, times 1/keep; an 8-byte seed."""
    count = max(1, round(vector.size * keep))
    at = rng.choice(vector.size, count, replace=False, shuffle=False)
    restored = np.zeros_like(vector)
    restored[at] = vector[at] * np.float32(vector.size / count)
    return restored, 4 * count + 8


def library(
    vector: FloatVector, rng: Rng, *, drop_rate: str, values: str, mask: str = "stratified"
) -> Sent:
    """The library's own update, encoded and decoded; the payload without its header."""
    from dare_agg.codec.mask import parse_drop_rate
    from dare_agg.codec.update import UpdateSpec, decode_update, encode_update
    from dare_agg.codec.update_header import HEADER_BYTES

    spec = UpdateSpec(
        size=vector.size,
        drop_rate=parse_drop_rate(drop_rate),
        mask=mask,
        mask_key=rng.bytes(16),
        values_key=rng.bytes(16),
        rank=0,
        values=values,
        base="00" * 32,
        layout="00" * 32,
    )
    blob = encode_update(spec, vector)
    restored = np.zeros_like(vector)
    decode_update(blob, spec).add(0, vector.size, restored)
    return restored, len(blob) - HEADER_BYTES


COMPRESSORS: Mapping[str, Callable[..., Sent]] = {
    "fedpaq8": partial(qsgd, bits=8),
    "fedpaq4": partial(qsgd, bits=4),
    "signsgd": signsgd,
    "topk": topk,
    "stc": stc,
    "eden1": eden1,
    "randk": randk,
}
_SPARSE = ("topk", "stc", "randk")


class Compressor:
    """A baseline over rounds: its random stream, feedback memories and STC's downlink."""

    def __init__(self, name: str, size: int, seed: int, settings: Mapping[str, Any]) -> None:
        self._function = COMPRESSORS[name]
        if name in _SPARSE:
            keep = 1 - float(settings["drop_rate"])
            self._function = partial(self._function, keep=keep)
        self._seed = seed
        self._feedback = bool(settings["feedback"]) or name == "stc"
        self._both_links = name == "stc"
        self._memory: dict[int, FloatVector] = {}
        # What a client gets in a round; None: the whole model. Like the version downlink, STC
        # starts from a base that the clients hold.
        self.down_bytes: int | None = 0 if self._both_links else None

    def _rng(self, number: int, client: int) -> Rng:
        return np.random.default_rng(np.random.SeedSequence([self._seed, 50, number, client]))

    def send(self, client: int, number: int, delta: FloatVector) -> Sent:
        """Compress one client's delta; what was left out is kept for the next time."""
        if self._feedback and client in self._memory:
            delta = delta + self._memory[client]
        restored, nbytes = self._function(delta, self._rng(number, client))
        if self._feedback:
            self._memory[client] = delta - restored
        return restored, nbytes

    def merge(self, step: FloatVector) -> FloatVector:
        """Compress the server's step too, where the method does."""
        if not self._both_links:
            return step
        step = step + self._memory.get(-1, np.float32(0))
        restored, self.down_bytes = self._function(step, self._rng(0, 0))
        self._memory[-1] = step - restored
        return restored


def make_compressor(name: str, size: int, seed: int, settings: Mapping[str, Any]) -> Compressor:
    """Make a baseline by name; an unknown one raises `ConfigError`."""
    if name not in COMPRESSORS:
        known = ("fedavg", "head-only", "dare", *COMPRESSORS)
        raise ConfigError(f"method {name!r} is unknown{did_you_mean(name, known)}")
    return Compressor(name, size, seed, settings)
