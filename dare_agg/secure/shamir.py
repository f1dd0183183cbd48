"""Shamir's secret sharing over the prime field of order 2**255 − 19.

A secret of 31 bytes is the constant term of a random polynomial of degree t − 1; party x
holds its value at x. Any t shares give the secret back, fewer say nothing about it
(Shamir 1979). Many secrets shared among the same parties are recovered with one set of
Lagrange coefficients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache

from dare_agg.errors import ConfigError, ProtocolError

PRIME = 2**255 - 19
SECRET_BYTES = 31
SHARE_BYTES = 32


def split(
    secret: bytes,
    points: Sequence[int],
    threshold: int,
    random: Callable[[int], bytes] = os.urandom,
) -> list[bytes]:
    """Return one 32-byte share per point; ``threshold`` of them recover the secret.

    Points are distinct integers from 1 to 2**32 − 1. Raises `ConfigError` for a secret of
    another length, a bad point or a threshold outside 1 to ``len(points)``.
    """
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"a secret has {len(secret)} bytes; {SECRET_BYTES} are needed")
    if not 1 <= threshold <= len(points):
        raise ConfigError(f"threshold {threshold} of {len(points)} shares is impossible")
    if len(set(points)) != len(points) or not all(0 < x < 1 << 32 for x in points):
        raise ConfigError("share points must be distinct, from 1 to 2**32 - 1")
    # 48 bytes modulo a 255-bit prime: off uniform by less than 2**-128.
    entropy = random(48 * (threshold - 1))
    coefficients = [
        int.from_bytes(entropy[at : at + 48], "little") % PRIME for at in range(0, len(entropy), 48)
    ]
    coefficients.append(int.from_bytes(secret, "little"))
    shares = []
    for x in points:
        value = 0
        for coefficient in coefficients:
            value = (value * x + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "little"))
    return shares


@lru_cache(maxsize=4096)
def lagrange(points: tuple[int, ...]) -> tuple[int, ...]:
    """Coefficients that turn the values at ``points`` into the value at 0."""
    numerators, denominators = [], []
    everything = 1
    for x in points:
        everything = everything * x % PRIME
    for x in points:
        below = x
        for other in points:
            if other != x:
                below = below * (other - x) % PRIME
        numerators.append(everything)
        denominators.append(below)
    # One inversion for all: Montgomery's trick.
    products = [1]
    for below in denominators:
        products.append(products[-1] * below % PRIME)
    inverse = pow(products[-1], -1, PRIME)
    result = [0] * len(points)
    for at in range(len(points) - 1, -1, -1):
        result[at] = numerators[at] * inverse % PRIME * products[at] % PRIME
        inverse = inverse * denominators[at] % PRIME
    return tuple(result)


def recover(points: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """Recover the secret from the shares at ``points``.

    Raises `ProtocolError` (reason "shares") when the shares hold no 31-byte secret, which
    means that at least one of them is wrong.
    """
    if len(points) != len(shares) or len(set(points)) != len(points):
        raise ProtocolError("shares and points do not pair up", reason="shares")
    value = sum(
        coefficient * share_value(share)
        for coefficient, share in zip(lagrange(tuple(points)), shares, strict=True)
    )
    value %= PRIME
    if value >> (8 * SECRET_BYTES):
        raise ProtocolError(
            f"{len(shares)} shares do not make up a secret; at least one of them is wrong",
            reason="shares",
        )
    return value.to_bytes(SECRET_BYTES, "little")


def share_value(share: bytes) -> int:
    """Read one share; raises `ProtocolError` unless it is a canonical field element."""
    value = int.from_bytes(share, "little")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise ProtocolError(
            f"a share of {len(share)} bytes is no element of the field; {SHARE_BYTES} bytes "
            "below 2**255 - 19 are needed",
            reason="shares",
        )
    return value
