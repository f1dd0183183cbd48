"""What a budget remembers of rounds that share their noise: who took part, and where it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dare_agg.codec.mask import MASK_KINDS, DropRate, Mask
from dare_agg.privacy.banded import Places

_NAME_BYTES = 16
_KEY_BYTES = 16


@dataclass(frozen=True)
class SpacedStep:
    """One release: the places of its values, and marks of the clients in it (`mark`)."""

    places: Places
    who: tuple[bytes, ...]


def mark(name: str) -> bytes:
    """What a budget keeps of a client's name."""
    return hashlib.sha256(b"dare-agg client\0" + name.encode()).digest()[:_NAME_BYTES]


def step_columns(steps: Sequence[SpacedStep]) -> dict[str, Any]:
    """The steps as arrays of a state file."""
    masks = [one.places.mask for one in steps]
    return {
        "step_keys": np.frombuffer(b"".join(mask.key for mask in masks), np.uint8),
        "step_places": np.array(
            [
                (
                    MASK_KINDS.index(mask.kind), mask.size, mask.rank, mask.drop_rate.numerator,
                    mask.drop_rate.denominator, one.places.dense, len(one.who),
                )
                for one, mask in zip(steps, masks, strict=True)
            ],
            np.int64,
        ).reshape(len(steps), 7),
        "step_who": np.frombuffer(b"".join(b"".join(one.who) for one in steps), np.uint8),
    }  # fmt: skip


def read_steps(arrays: Mapping[str, Any]) -> tuple[SpacedStep, ...]:
    """As `step_columns` wrote them; raises `ValueError`, `KeyError` or `ConfigError` for others."""
    places, keys = arrays["step_places"], arrays["step_keys"].tobytes()
    who = arrays["step_who"].tobytes()
    if places.ndim != 2 or places.shape[1] != 7 or len(keys) != _KEY_BYTES * len(places):
        raise ValueError("its steps are none")
    if (places < 0).any() or (places[:, 0] >= len(MASK_KINDS)).any():
        raise ValueError("its masks are none")
    if len(who) != _NAME_BYTES * int(places[:, 6].sum()):
        raise ValueError("who took part in its steps is not known")
    found = []
    at = 0
    for i, (kind, size, rank, numerator, denominator, dense, count) in enumerate(places.tolist()):
        key = keys[_KEY_BYTES * i : _KEY_BYTES * (i + 1)]
        rate = DropRate(numerator, denominator)
        mask = Mask(MASK_KINDS[kind], size, rate, key, rank)
        end = at + _NAME_BYTES * count
        marks = tuple(who[lo : lo + _NAME_BYTES] for lo in range(at, end, _NAME_BYTES))
        found.append(SpacedStep(Places(mask, dense), marks))
        at = end
    return tuple(found)
