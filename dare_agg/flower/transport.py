"""Payloads inside Flower messages.

A payload is opaque bytes. It travels as uint8 arrays of at most 128 KiB, because Flower
uploads each array's chunks as one request each and retries whole chunks: on a slow uplink
large ones never arrive. Nothing here is pickled or parsed by NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from dare_agg.errors import UpdateError
from dare_agg.flower.internals import record_bytes

PAYLOAD_STYPE = "dare.payload.v1"
PIECE_BYTES = 128 * 1024


def pack(payload: bytes) -> ArrayRecord:
    """Cut a payload into an ArrayRecord of pieces named "0", "1", …"""
    record = ArrayRecord()
    for number, lo in enumerate(range(0, len(payload), PIECE_BYTES)):
        piece = payload[lo : lo + PIECE_BYTES]
        record[str(number)] = Array(
            dtype="uint8", shape=(len(piece),), stype=PAYLOAD_STYPE, data=bytes(piece)
        )
    return record


def unpack(record: ArrayRecord, limit: int) -> bytes:
    """Join the pieces of a payload of at most ``limit`` bytes.

    Raises `UpdateError`: reason "oversized" (before joining), "truncated" for a missing
    piece, "transport" for arrays that are no pieces.
    """
    total = 0
    pieces: list[bytes] = []
    for number in range(len(record)):
        array = record.get(str(number))
        if array is None:
            raise UpdateError(
                f"payload piece {number} of {len(record)} is missing", reason="truncated"
            )
        if array.dtype != "uint8" or array.stype != PAYLOAD_STYPE:
            raise UpdateError(
                f"payload piece {number} is {array.dtype!r} of type {array.stype!r}; uint8 of "
                f"{PAYLOAD_STYPE!r} is needed",
                reason="transport",
            )
        if tuple(array.shape) != (len(array.data),):
            raise UpdateError(
                f"payload piece {number} declares shape {tuple(array.shape)} and has "
                f"{len(array.data)} bytes",
                reason="truncated",
            )
        total += len(array.data)
        if total > limit:
            raise UpdateError(
                f"payload has more than the {limit} bytes the plan allows", reason="oversized"
            )
        pieces.append(array.data)
    return b"".join(pieces)


class SentArrays(Mapping[str, NDArray[np.generic]]):
    """An ArrayRecord as named arrays, each read only when it is asked for."""

    def __init__(self, record: ArrayRecord) -> None:
        self.record = record

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        return self.record[name].numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self.record)

    def __len__(self) -> int:
        return len(self.record)


def to_numpy(record: ArrayRecord) -> dict[str, NDArray[np.generic]]:
    """Read an ArrayRecord as NumPy arrays, in its order."""
    return {name: array.numpy() for name, array in record.items()}


def to_record(arrays: Mapping[str, NDArray[np.generic]]) -> ArrayRecord:
    """Make an ArrayRecord of NumPy arrays, in their order."""
    return ArrayRecord({name: Array(np.asarray(a, order="C")) for name, a in arrays.items()})


def message_bytes(content: RecordDict) -> int:
    """Bytes of a message's content as Flower serialises it, object identifiers left out.

    Flower's simulation does not count traffic and its own ``count_bytes`` raises on
    empty text, so this is counted here.
    """
    total = 0
    for key, record in content.items():
        total += len(key)
        if isinstance(record, ArrayRecord):
            total += sum(len(name) + len(array.data) for name, array in record.items())
        elif isinstance(record, ConfigRecord | MetricRecord):
            total += record_bytes(record)
    return total
