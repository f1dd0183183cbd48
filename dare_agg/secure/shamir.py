"""Shamir's secret sharing over the prime field of order 2**255 − 19.

A secret of 31 bytes is the constant term of a random polynomial of degree t − 1; party x
holds its value at x. Any t shares give the secret back, fewer say nothing about it
(Shamir 1979). Many secrets shared among the same parties are recovered with one set of
Lagrange coefficients. Where some shares are wrong, spare ones correct them: shares are a
Reed-Solomon code word, decoded as in Gao 2003, "A new algorithm for decoding Reed-Solomon
codes".
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


def correct(points: Sequence[int], shares: Sequence[bytes], threshold: int) -> bytes:
    """Recover the secret although up to ``(len(points) - threshold) // 2`` shares are wrong.

    Raises `ProtocolError` (reason "shares") where more are.
    """
    count = len(points)
    if len(set(points)) != count or count != len(shares) or count < threshold:
        raise ProtocolError("shares and points do not pair up", reason="shares")
    values = [share_value(share) for share in shares]
    whole = [1]
    for x in points:
        whole = _product(whole, [-x % PRIME, 1])
    last, rest = whole, _through(whole, points, values)
    last_factor: list[int] = []
    factor = [1]
    # The extended Euclidean algorithm up to half way: the factor locates the errors.
    while 2 * (len(rest) - 1) >= count + threshold:
        quotient, remainder = _divide(last, rest)
        last, rest = rest, remainder
        last_factor, factor = factor, _minus(last_factor, _product(quotient, factor))
    found, left = _divide(rest, factor)
    wrong = sum(_at(found, x) != y for x, y in zip(points, values, strict=True))
    secret = found[0] if found else 0
    if (
        left
        or len(found) > threshold
        or 2 * wrong > count - threshold
        or secret >> (8 * SECRET_BYTES)
    ):
        raise ProtocolError(
            f"{count} shares do not make up a secret of {threshold}; more than "
            f"{(count - threshold) // 2} of them are wrong",
            reason="shares",
        )
    return secret.to_bytes(SECRET_BYTES, "little")


# Polynomials are lists of coefficients, lowest first, without zeros at the end.


def _trim(poly: list[int]) -> list[int]:
    while poly and not poly[-1]:
        poly.pop()
    return poly


def _product(one: list[int], other: list[int]) -> list[int]:
    out = [0] * max(0, len(one) + len(other) - 1)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            out[i + j] += a * b
    return _trim([value % PRIME for value in out])


def _minus(one: list[int], other: list[int]) -> list[int]:
    size = max(len(one), len(other))
    longer = (poly + [0] * (size - len(poly)) for poly in (one, other))
    return _trim([(a - b) % PRIME for a, b in zip(*longer, strict=True)])


def _divide(over: list[int], under: list[int]) -> tuple[list[int], list[int]]:
    left, quotient = list(over), [0] * max(0, len(over) - len(under) + 1)
    inverse = pow(under[-1], -1, PRIME)
    for at in reversed(range(len(quotient))):
        quotient[at] = left[at + len(under) - 1] * inverse % PRIME
        for j, b in enumerate(under):
            left[at + j] = (left[at + j] - quotient[at] * b) % PRIME
    return _trim(quotient), _trim(left)


def _at(poly: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(poly):
        value = (value * x + coefficient) % PRIME
    return value


def _through(whole: list[int], points: Sequence[int], values: Sequence[int]) -> list[int]:
    """The polynomial of the lowest degree through the points; ``whole`` is 0 at each."""
    out = [0] * len(points)
    slope = [place * a % PRIME for place, a in enumerate(whole)][1:]
    for x, y in zip(points, values, strict=True):
        weight = y * pow(_at(slope, x), -1, PRIME) % PRIME
        # whole / (X - x), by Horner's scheme.
        carry = 0
        for at in reversed(range(len(points))):
            carry = (carry * x + whole[at + 1]) % PRIME
            out[at] += weight * carry
    return _trim([value % PRIME for value in out])
