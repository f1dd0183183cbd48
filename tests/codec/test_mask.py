import hashlib
import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.codec.mask import MASK_KINDS, DropRate, Mask, parse_drop_rate
from dare_agg.errors import ConfigError

KEY = bytes(range(16))
RATES = ("0", "0.5", "0.3", "0.9", "0.99", "0.123")


@pytest.mark.parametrize(
    ("text", "stride"),
    [("0", (1, 1)), ("0.9", (10, 1)), (0.99, (100, 1)), (0.3, (10, 7)), ("2/3", (3, 1))],
)
def test_drop_rates_are_exact(text, stride):
    assert parse_drop_rate(text) == DropRate(*stride)


@pytest.mark.parametrize("bad", [1, 1.5, -0.1, "nan", float("inf"), "x", None, True, 0.12345678])
def test_bad_drop_rates_are_refused(bad):
    with pytest.raises(ConfigError, match="drop rate"):
        parse_drop_rate(bad)


def plain_stratified(size, num, den, key, rank):
    """The rule of UPDATE_FORMAT.md in plain integers."""
    strata = -(-size * den // num)
    stream = (
        Cipher(algorithms.AES128(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * strata))
    )
    words = struct.unpack(f"<{strata}I", stream)
    survivors = []
    for j, word in enumerate(words):
        lo, hi = j * num // den, min(size, (j + 1) * num // den)
        survivors.append(lo + ((word * (hi - lo) >> 32) + rank) % (hi - lo))
    return survivors


@given(
    st.integers(0, 3000),
    st.sampled_from(RATES),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 40),
)
@settings(max_examples=60, deadline=None)
def test_stratified_follows_the_plain_rule(size, rate, key, rank):
    drop = parse_drop_rate(rate)
    mask = Mask("stratified", size, drop, key, rank)
    expected = plain_stratified(size, drop.numerator, drop.denominator, key, rank)
    assert mask.indices(0, size).tolist() == expected
    assert mask.survivors == len(expected)


@given(
    st.sampled_from(MASK_KINDS),
    st.integers(0, 200_000),
    st.sampled_from(RATES),
    st.floats(0, 1),
    st.integers(0, 20),
)
@settings(max_examples=40, deadline=None)
def test_any_part_can_be_drawn_alone(kind, size, rate, cut, rank):
    mask = Mask(kind, size, parse_drop_rate(rate), KEY, rank)
    whole = mask.indices(0, size)
    middle = int(size * cut)
    parts = np.concatenate([mask.indices(0, middle), mask.indices(middle, size)])
    assert np.array_equal(parts, whole)
    assert mask.ordinal(middle) == np.count_nonzero(whole < middle)
    first = int(mask.survivors * cut)
    blocks = [positions.copy() for positions, _ in mask.blocks(first)]
    assert np.array_equal(np.concatenate(blocks) if blocks else whole[:0], whole[first:])


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_ranks_are_disjoint_and_cover_everything(kind):
    masks = [Mask(kind, 5000, parse_drop_rate("0.9"), KEY, rank) for rank in range(10)]
    kept = np.concatenate([mask.indices(0, 5000) for mask in masks])
    assert len(kept) == len(set(kept.tolist()))
    if kind == "stratified":
        assert len(kept) == 5000


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("rate", ["0.5", "0.3", "0.9"])
def test_every_element_survives_equally_often(kind, rate):
    drop, size, draws = parse_drop_rate(rate), 400, 3000
    counts = np.zeros(size)
    for draw in range(draws):
        key = hashlib.sha256(struct.pack("<I", draw)).digest()[:16]
        counts[Mask(kind, size, drop, key).indices(0, size)] += 1
    # The chance is 1/width of the own stratum; over a period of strata it is 1 - p.
    expected = np.empty(size)
    if kind == "stratified":
        num, den = drop.numerator, drop.denominator
        for j in range(-(-size * den // num)):
            lo, hi = j * num // den, min(size, (j + 1) * num // den)
            expected[lo:hi] = 1 / (hi - lo)
    else:
        expected[:] = drop.keep
    error = (counts / draws - expected) / np.sqrt(
        np.maximum(expected * (1 - expected), 1e-9) / draws
    )
    uncertain = expected < 1
    assert np.abs(error[uncertain]).max() < 5
    assert np.array_equal(counts[~uncertain], np.full(np.count_nonzero(~uncertain), draws))


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_golden_positions(kind):
    mask = Mask(kind, 1_000_000, parse_drop_rate("0.99"), KEY, 3)
    digest = hashlib.sha256(mask.indices(0, mask.size).astype("<i8").tobytes()).hexdigest()
    golden = {
        "stratified": "d8b804801b763324",
        "bernoulli": "623d71451d52369d",
    }
    assert digest[:16] == golden[kind]


def test_gather_and_scatter_rescale_without_bias():
    vector = np.random.default_rng(0).standard_normal(999).astype(np.float32)
    total = np.zeros(999)
    for draw in range(2000):
        key = hashlib.sha256(struct.pack("<I", draw)).digest()[:16]
        mask = Mask("stratified", 999, parse_drop_rate("0.9"), key)
        total += mask.scatter(mask.gather(vector))
    assert np.linalg.norm(total / 2000 - vector) < 1.2 * np.linalg.norm(vector) * (9 / 2000) ** 0.5
