"""Payload pieces: size, order, and what is refused before anything is joined."""

from __future__ import annotations

import os

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from dare_agg.errors import UpdateError
from dare_agg.flower.transport import (
    PIECE_BYTES,
    message_bytes,
    pack,
    to_numpy,
    to_record,
    unpack,
)


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 13 * PIECE_BYTES - 5])
def test_payloads_round_trip_in_small_pieces(size):
    payload = os.urandom(size)
    record = pack(payload)
    assert all(len(array.data) <= PIECE_BYTES for array in record.values())
    assert unpack(record, size) == payload


def test_pieces_are_joined_by_number_not_by_order():
    payload = os.urandom(12 * PIECE_BYTES)
    record = pack(payload)
    shuffled = ArrayRecord({name: record[name] for name in sorted(record, reverse=True)})
    assert unpack(shuffled, len(payload)) == payload


def piece(data=b"abc", dtype="uint8", shape=None, stype="dare.payload.v1"):
    return Array(dtype=dtype, shape=shape or (len(data),), stype=stype, data=data)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"1": piece()}, "truncated"),
        ({"0": piece(), "2": piece()}, "truncated"),
        ({"0": piece(shape=(10_000_000_000,))}, "truncated"),
        ({"0": piece(dtype="object")}, "transport"),
        ({"0": piece(stype="numpy.ndarray")}, "transport"),
        ({"0": piece(b"x" * 101)}, "oversized"),
    ],
)
def test_what_is_no_payload_is_refused(arrays, reason):
    with pytest.raises(UpdateError) as caught:
        unpack(ArrayRecord(arrays), 100)
    assert caught.value.reason == reason


def test_arrays_keep_order_shape_and_dtype():
    arrays = {"10": np.ones((2, 3), np.float16), "2": np.asarray(4), "1": np.zeros(0)}
    restored = to_numpy(to_record(arrays))
    assert list(restored) == ["10", "2", "1"]
    for name, array in arrays.items():
        assert restored[name].shape == array.shape and restored[name].dtype == array.dtype


def test_message_bytes_counts_payload_and_the_rest():
    content = RecordDict({"p": pack(bytes(1000)), "c": ConfigRecord({"text": ""})})
    assert 1000 < message_bytes(content) < 1100
