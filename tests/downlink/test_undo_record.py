"""Records of old values: read as they were written, in few bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.downlink.disk.undo_record import OldValues, decode_old, encode_old


def same(old: OldValues) -> int:
    data = encode_old(old)
    found = decode_old(data)
    np.testing.assert_array_equal(found.positions, old.positions)
    assert found.positions.dtype == np.int64
    np.testing.assert_array_equal(found.low, old.low)
    np.testing.assert_array_equal(found.rest, old.rest)
    high = np.zeros(old.low.size) if old.high is None else old.high
    np.testing.assert_array_equal(0 if found.high is None else found.high, high)
    return len(data)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from((1, 2, 5, 40, 1000, 10**11)),
    st.sampled_from((0, 1, 30, 32767)),
    st.sampled_from((None, 0, 20, 32767)),
    st.integers(1, 3000),
)
def test_a_record_is_read_as_it_was_written(seed, gap, low, high, count) -> None:
    rng = np.random.default_rng(seed)
    positions = np.cumsum(rng.integers(1, gap + 1, count)) + rng.integers(0, 2**40)
    halves = [
        None if most is None else rng.integers(-most - 1, most + 1, count).astype(np.int16)
        for most in (low, high)
    ]
    rest = rng.integers(0, 256, count).astype(np.uint8) * np.uint8(rng.random() < 0.8)
    same(OldValues(positions.astype(np.int64), halves[0], rest, halves[1]))


@pytest.mark.parametrize(("moved", "nbytes"), [(0.0, 0.9), (1.0, 4.6)])
def test_what_never_moved_costs_its_place_alone(moved: float, nbytes: float) -> None:
    rng = np.random.default_rng(0)
    count = 100_000
    positions = np.cumsum(rng.geometric(0.04, count))
    here = rng.random(count) < moved
    low = np.where(here, rng.integers(-32768, 32768, count), 0).astype(np.int16)
    high = np.where(here, rng.integers(-15, 16, count), 0).astype(np.int16)
    rest = np.where(here, 120 + rng.geometric(0.1, count) % 60, 0).astype(np.uint8)
    assert same(OldValues(positions, low, rest, high if moved else None)) <= nbytes * count
