import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import MASK_KINDS, parse_drop_rate
from dare_agg.codec.payload import check_payload, decode_values, encode_values, payload_bytes
from dare_agg.codec.rotation import GROUP, count_blocks, cut_blocks, flip_signs, hadamard
from dare_agg.codec.update import UpdateSpec, decode_update, encode_update
from dare_agg.errors import ConfigError, NonFiniteError, UpdateError

FORMATS = sorted(VALUE_FORMATS)


def key_of(number):
    return hashlib.sha256(struct.pack("<I", number)).digest()[:16]


def round_trip(name, values, key=bytes(16)):
    buffer = bytearray(payload_bytes(name, values.size))
    groups = (values[lo : lo + GROUP] for lo in range(0, values.size, GROUP))
    encode_values(name, groups, values.size, key, memoryview(buffer))
    payload = np.frombuffer(buffer, np.uint8)
    check_payload(name, payload, values.size)
    parts = [
        decode_values(name, payload, values.size, key, group)
        for group in range(-(-values.size // GROUP))
    ]
    return np.concatenate(parts) if parts else values[:0]


@given(st.integers(0, GROUP))
@settings(max_examples=100, deadline=None)
def test_blocks_are_never_padded(count):
    blocks = list(cut_blocks(count))
    assert sum(rows * columns for _, rows, columns in blocks) == count
    assert [start for start, _, _ in blocks] == sorted(start for start, _, _ in blocks)
    rotated = sum(columns for _, rows, columns in blocks if rows > 1)
    assert (rotated, sum(c for _, rows, c in blocks if rows == 1)) == count_blocks(count)


@pytest.mark.parametrize("rows", [32, 512, 1024])
def test_hadamard_is_its_own_inverse_up_to_its_size(rows):
    rng = np.random.default_rng(0)
    matrix = rng.integers(-50, 50, (rows, 3)).astype(np.float32)
    number = np.arange(rows)
    parity = np.array([[bin(i & j).count("1") % 2 for j in number] for i in number])
    expected = (1 - 2 * parity) @ matrix
    if rows == 1024:
        expected = expected.reshape(32, 32, 3).transpose(1, 0, 2).reshape(rows, 3)
    spares = [np.empty_like(matrix) for _ in range(2)]
    once = hadamard(matrix.copy(), spares[0])
    assert np.array_equal(once, expected)
    assert np.array_equal(hadamard(once.copy(), spares[1]), rows * matrix)


def test_flipped_signs_are_the_keystream_bits():
    values = np.ones(19, np.float32)
    keystream = np.array([0b0000_0101, 0xFF, 0b0000_0010], np.uint8)
    flip_signs(values, keystream)
    assert np.flatnonzero(values < 0).tolist() == [0, 2, *range(8, 16), 17]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1023, 1024, 1500, GROUP, GROUP + 1])
def test_sizes_are_exact_and_small_values_survive(name, count):
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    decoded = round_trip(name, values)
    assert decoded.shape == values.shape
    if count:
        bound = {"f32": 0, "f16": 1e-6, "bf16": 1e-4, "i8": 1e-3, "b4": 0.03, "b2": 0.3, "b1": 1}
        error = np.sum((decoded - values) ** 2) / np.sum(values**2)
        assert error <= bound[name]


@pytest.mark.parametrize("name", FORMATS)
def test_size_targets(name):
    survivors = 10_000_000
    bits = payload_bytes(name, survivors) * 8 / survivors
    assert bits <= VALUE_FORMATS[name].bits + 0.04


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_updates_are_unbiased_with_the_predicted_error(kind, name):
    """NMSE of one update is (1 + v)/(1 - p) - 1; the mean of T updates shrinks it to 1/T."""
    size, draws, drop = 20_000, 25, parse_drop_rate("0.9")
    delta = np.random.default_rng(1).standard_normal(size).astype(np.float32) * np.float32(1e-3)
    total, errors = np.zeros(size), []
    for draw in range(draws):
        spec = UpdateSpec(
            size, drop, kind, key_of(draw), key_of(1000 + draw), 0, name, "0" * 64, "1" * 64
        )
        update = decode_update(encode_update(spec, delta), spec)
        dense = np.empty(size, np.float32)
        update.read(0, size, dense)
        errors.append(np.sum((dense - delta) ** 2) / np.sum(delta**2))
        total += dense
    predicted = (1 + VALUE_FORMATS[name].nmse) / drop.keep - 1
    assert np.mean(errors) == pytest.approx(predicted, rel=0.05)
    error_of_mean = np.sum((total / draws - delta) ** 2) / np.sum(delta**2)
    assert error_of_mean == pytest.approx(predicted / draws, rel=0.08)


@pytest.mark.parametrize("name", ["b1", "b2", "b4", "i8"])
def test_rounding_is_unbiased_for_heavy_tails_and_zeros(name):
    rng = np.random.default_rng(2)
    values = (rng.standard_normal(2048) ** 3).astype(np.float32)
    values[rng.random(2048) < 0.4] = 0
    draws = 400
    mean = sum(round_trip(name, values, key_of(i)).astype(np.float64) for i in range(draws)) / draws
    nmse = np.sum((mean - values) ** 2) / np.sum(values.astype(np.float64) ** 2)
    allowed = max(VALUE_FORMATS[name].nmse, 1e-3) / draws
    assert nmse < 1.3 * allowed


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**61])
def test_what_is_no_number_is_refused(name, bad):
    values = np.ones(100, np.float32)
    values[17] = bad
    with pytest.raises(NonFiniteError, match="survivor number 17"):
        round_trip(name, values)


def test_f16_overflow_names_the_remedy():
    with pytest.raises(NonFiniteError, match="use bf16 or f32"):
        round_trip("f16", np.full(3, 1e5, np.float32))


def test_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'b1'"):
        payload_bytes("b11", 3)


def test_contents_out_of_bounds_are_refused():
    survivors = 1024 + 3
    payload = np.zeros(payload_bytes("b1", survivors), np.uint8)
    check_payload("b1", payload, survivors)
    scale = payload[128:132]
    for value, error in [(np.nan, NonFiniteError), (np.inf, NonFiniteError), (-1.0, UpdateError)]:
        scale[:] = np.array([value], "<f4").view(np.uint8)
        with pytest.raises(error):
            check_payload("b1", payload, survivors)
    codes = np.zeros(payload_bytes("i8", 32), np.uint8)
    codes[0] = 0x80
    with pytest.raises(UpdateError, match="-128"):
        check_payload("i8", codes, 32)


@pytest.mark.parametrize("name", FORMATS)
def test_golden_payloads(name):
    """The same bytes on every platform and with every numpy."""
    values = (np.arange(5000, dtype=np.int64) * 7919 % 10007 - 5003).astype(np.float32)
    values *= np.float32(2.0**-20)
    buffer = bytearray(payload_bytes(name, values.size))
    encode_values(name, iter([values]), values.size, key_of(5), memoryview(buffer))
    decoded = decode_values(name, np.frombuffer(buffer, np.uint8), values.size, key_of(5), 0)
    found = hashlib.sha256(bytes(buffer)).hexdigest()[:12]
    back = hashlib.sha256(decoded.astype("<f4").tobytes()).hexdigest()[:12]
    assert (found, back) == GOLDEN[name]


GOLDEN = {
    "f32": ("ddf9386d85b7", "ddf9386d85b7"),
    "f16": ("c61b40540147", "027fdbbef1a9"),
    "bf16": ("dbe61a14c878", "89e88f1482b6"),
    "i8": ("6098d1f67e27", "829e60e1e6b3"),
    "b4": ("971573ab757b", "78290219d686"),
    "b2": ("66ac87ac26c9", "a1dac3a59c43"),
    "b1": ("bdc9efccacef", "70bc133337be"),
}
