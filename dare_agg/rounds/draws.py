"""What is drawn in a run: its secret, and who takes part in a round."""

from __future__ import annotations

import os

from dare_agg.codec.derive import derive_key
from dare_agg.errors import ConfigError


def run_secret(seed: int | None) -> bytes:
    """32 bytes that a run's keys are derived from: by ``seed`` (0 to 2^63 − 1), else drawn."""
    if seed is None:
        return os.urandom(32)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ConfigError(f"seed = {seed!r}; an integer from 0 to 2^63 - 1 is needed, or None")
    return derive_key(seed.to_bytes(8, "little"), "run", length=32)


def round_secret(secret: bytes, number: int) -> bytes:
    """32 bytes that a round's plans are derived from."""
    return derive_key(secret, "round", number, length=32)


def drawn_places(clients: int, count: int, secret: bytes, number: int) -> list[int]:
    """Draw ``count`` of so many clients, in order, the same for the same secret and round.

    >>> drawn_places(3, 5, bytes(32), 1)
    [0, 1, 2]
    """
    if count >= clients:
        return list(range(clients))
    keys = [derive_key(secret, "sample", number, index) for index in range(clients)]
    return sorted(sorted(range(clients), key=lambda index: keys[index])[:count])
