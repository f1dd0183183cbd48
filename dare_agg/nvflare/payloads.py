"""The downlink's payloads, pulled by a site piece by piece: neither end holds a second copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dare_agg.downlink.base import BASE, DENSE_STEPS, STEPS
from dare_agg.errors import BaseMismatchError, UpdateError

# A server holds one piece for each site that is pulling, whatever the model's size.
PIECE_BYTES = 1 << 20
MAX_DOWN_BYTES = 1 << 40
_NAMES = (BASE, STEPS, DENSE_STEPS)


class Pieces:
    """Payloads laid end to end, and cut where they are asked for."""

    def __init__(self, payloads: Mapping[str, bytes]) -> None:
        self.payloads = {name: payloads[name] for name in _NAMES if name in payloads}

    def cut(self, at: int) -> dict[str, Any]:
        """The piece that begins ``at`` so many bytes, and the sizes of all payloads.

        Raises `UpdateError` (reason "malformed") for a place outside them.
        """
        sizes = {name: len(payload) for name, payload in self.payloads.items()}
        if not 0 <= at <= sum(sizes.values()):
            raise UpdateError(
                f"a piece at {at} of {sum(sizes.values())} bytes was asked for", reason="malformed"
            )
        for payload in self.payloads.values():
            if at < len(payload):
                # A piece ends with its payload: nothing is joined.
                return {"sizes": sizes, "piece": bytes(payload[at : at + PIECE_BYTES])}
            at -= len(payload)
        return {"sizes": sizes, "piece": b""}


def pull(ask: Callable[[int], Mapping[str, Any]]) -> dict[str, bytes]:
    """All payloads, by ``ask`` for the piece at each place in turn.

    Raises `BaseMismatchError` where the pieces are none of payloads, or of others than at first.
    """
    first: dict[str, int] | None = None
    found: list[bytes] = []
    at = 0
    while first is None or at < sum(first.values()):
        answer = ask(at)
        sizes, piece = answer.get("sizes"), answer.get("piece")
        if first is None:
            first = _checked(sizes)
        left = sum(first.values()) - at
        good = isinstance(piece, bytes) and (bool(piece) == bool(left)) and len(piece) <= left
        if sizes != first or not good:
            raise BaseMismatchError(
                f"the piece at {at} of a version is not what the first one announced"
            )
        assert isinstance(piece, bytes)
        found.append(piece)
        at += len(piece)
    return _parted(found, first)


def _checked(sizes: object) -> dict[str, int]:
    good = (
        isinstance(sizes, dict)
        and set(sizes) <= set(_NAMES)
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes.values())
    )
    if not good or sum(sizes.values()) > MAX_DOWN_BYTES:  # type: ignore[attr-defined]
        raise BaseMismatchError("what brings a version is malformed")
    return dict(sizes)  # type: ignore[call-overload,no-any-return]


def _parted(pieces: list[bytes], sizes: Mapping[str, int]) -> dict[str, bytes]:
    """The payloads by name; a piece ends with its payload at the latest."""
    parted: dict[str, bytes] = {}
    pieces.reverse()
    for name, size in sizes.items():
        own: list[bytes] = []
        while sum(map(len, own)) < size:
            own.append(pieces.pop())
        parted[name] = own[0] if len(own) == 1 else b"".join(own)
        if len(parted[name]) != size:
            raise BaseMismatchError(f"payload {name!r} of a version was cut at another place")
    return parted
