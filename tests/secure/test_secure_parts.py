"""Shamir, masks, packed words, quantiser, graph: known answers, exactness, limits."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import seeded

from dare_agg.errors import ConfigError, NonFiniteError, ProtocolError
from dare_agg.secure.graph import degree_for, draw_neighbours
from dare_agg.secure.packing import Quantiser, merge_sums, pack_party, quantise, unpack_sums
from dare_agg.secure.shamir import PRIME, correct, lagrange, recover, split
from dare_agg.secure.stream import add_mask, cut_words, pack_words, unpack_words, word_type


def fixed(length: int) -> bytes:
    return hashlib.shake_256(b"known answers").digest(length)


# --- Shamir -------------------------------------------------------------------------------


def test_shamir_known_answers() -> None:
    shares = split(bytes(range(31)), [1, 2, 5], 2, fixed)
    slope = int.from_bytes(fixed(48), "little") % PRIME
    secret = int.from_bytes(bytes(range(31)), "little")
    assert [int.from_bytes(s, "little") for s in shares] == [
        (secret + slope * x) % PRIME for x in (1, 2, 5)
    ]
    assert shares[0].hex() == SHAMIR_FIRST


SHAMIR_FIRST = "a31d6cec8edddf83fc520857e31e14ddfdb694f7b9dbf31a71f599fb11c7682f"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_threshold_of_shares_recovers(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 12))
    threshold = data.draw(st.integers(1, n))
    secret = data.draw(st.binary(min_size=31, max_size=31))
    points = data.draw(st.lists(st.integers(1, 2**32 - 1), min_size=n, max_size=n, unique=True))
    shares = split(secret, points, threshold)
    chosen = data.draw(st.permutations(range(n)))[:threshold]
    assert recover([points[i] for i in chosen], [shares[i] for i in chosen]) == secret


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_spare_shares_correct_half_as_many_wrong_ones(data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, 8))
    spare = data.draw(st.integers(0, 6))
    n = threshold + spare
    secret = data.draw(st.binary(min_size=31, max_size=31))
    points = data.draw(st.lists(st.integers(1, 200), min_size=n, max_size=n, unique=True))
    shares = split(secret, points, threshold)
    wrong = data.draw(st.sets(st.integers(0, n - 1), max_size=spare // 2))
    for at in wrong:
        other = (int.from_bytes(shares[at], "little") + data.draw(st.integers(1, 2**250))) % PRIME
        shares[at] = other.to_bytes(32, "little")
    assert correct(points, shares, threshold) == secret


def test_more_wrong_shares_than_spare_ones_allow_are_noticed() -> None:
    shares = split(bytes(range(31)), range(1, 8), 3)
    for count in (3, 4, 7):
        bad = [hashlib.sha256(bytes([i])).digest()[:31] + b"\0" for i in range(count)]
        bad += shares[count:]
        with pytest.raises(ProtocolError, match="more than 2 of them are wrong"):
            correct(range(1, 8), bad, 3)
    with pytest.raises(ProtocolError, match="pair up"):
        correct([1, 1, 2], shares[:3], 3)


def test_fewer_shares_say_nothing() -> None:
    """For every candidate secret there is a polynomial through t − 1 shares: all fit alike."""
    points, threshold = [1, 2, 3], 3
    shares = split(b"\x07" * 31, points, threshold)
    for candidate in (0, 1, 2**247):
        # Extend two real shares and a made-up secret to a third share.
        coefficients = lagrange((1, 2, 3))
        values = [int.from_bytes(s, "little") for s in shares[:2]]
        rest = candidate - sum(c * v for c, v in zip(coefficients, values, strict=False))
        third = (rest * pow(coefficients[2], -1, PRIME) % PRIME).to_bytes(32, "little")
        assert recover(points, [*shares[:2], third]) == candidate.to_bytes(31, "little")


def test_shamir_limits() -> None:
    with pytest.raises(ConfigError, match="31 are needed"):
        split(bytes(32), [1, 2], 2)
    with pytest.raises(ConfigError, match="impossible"):
        split(bytes(31), [1, 2], 3)
    with pytest.raises(ConfigError, match="distinct"):
        split(bytes(31), [1, 1], 2)
    with pytest.raises(ConfigError, match="distinct"):
        split(bytes(31), [0, 1], 2)
    with pytest.raises(ProtocolError, match="no element of the field"):
        recover([1, 2], [b"\xff" * 32, bytes(32)])
    with pytest.raises(ProtocolError, match="at least one of them is wrong"):
        recover([1, 2], [b"\x01" * 31 + b"\x7f", bytes(32)])


# --- masks and words ----------------------------------------------------------------------


def test_mask_stream_known_answer() -> None:
    """The keystream of AES-256-CTR, key 00..1f, counter 0 (checked with openssl enc)."""
    words = np.zeros(4, np.uint32)
    add_mask(words, bytes(range(32)))
    assert words.astype("<u4").tobytes().hex() == "f29000b62a499fd0a9f39a6add2e7780"
    wide = np.zeros(2, np.uint64)
    add_mask(wide, bytes(range(32)))
    assert wide.astype("<u8").tobytes() == words.astype("<u4").tobytes()


@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
def test_masks_cancel_over_chunks(kind: type) -> None:
    words = np.arange(70_001, dtype=kind)
    add_mask(words, bytes(32))
    assert (words != np.arange(70_001, dtype=kind)).mean() > 0.99
    add_mask(words, bytes(32), negative=True)
    assert (words == np.arange(70_001, dtype=kind)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_packed_words_against_python_integers(bits: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kind = word_type(bits)
    words = cut_words(rng.integers(0, 2**63, count, dtype=np.uint64).astype(kind), bits)
    packed = pack_words(words, bits)
    assert len(packed) == -(-count * bits // 8)
    number = sum(int(word) << (i * bits) for i, word in enumerate(words))
    assert packed == number.to_bytes(len(packed), "little")
    assert (unpack_words(packed, count, bits) == words).all()


def test_unpacking_is_strict() -> None:
    with pytest.raises(ValueError, match="take"):
        unpack_words(bytes(2), 3, 7)
    unpack_words(bytes(3), 3, 8)
    with pytest.raises(ValueError, match="padding"):
        unpack_words(b"\x00\x00\xff", 3, 7)


# --- quantiser ----------------------------------------------------------------------------


def test_word_widths_of_the_design() -> None:
    assert Quantiser("ties", 8, 1.0, 10).word_bits == 32
    assert Quantiser("ties", 16, 1.0, 100).word_bits == 60
    assert Quantiser("mean", 16, 1.0, 100).word_bits == 24


def test_unsafe_bits_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"bits = 12 or fewer"):
        Quantiser("ties", 16, 1.0, 1000)
    assert Quantiser("ties", 12, 1.0, 1000).word_bits <= 64
    for bad in (
        {"bits": 3},
        {"bits": 25},
        {"clip": 0.0},
        {"clip": float("nan")},
        {"aggregate": "median"},
    ):
        with pytest.raises(ConfigError):
            Quantiser(**{"aggregate": "mean", "bits": 8, "clip": 1.0, "parties": 3, **bad})


def test_stochastic_rounding_is_unbiased_and_clips() -> None:
    quantiser = Quantiser("mean", 4, 1.0, 3)
    values = np.full(200_000, 0.37, np.float32)
    tau, clipped = quantise(values, quantiser, bytes(16))
    assert set(np.unique(tau)) == {5, 6} and clipped == 0
    # 0.37 · 15 = 5.55; the standard error of the mean is .0011.
    assert abs(tau.mean() - 5.55) < 0.006
    tau, clipped = quantise(np.array([2.0, -3.0, -1.0, 0.0], np.float32), quantiser, bytes(16))
    assert tau.tolist() == [15, -15, -15, 0] and clipped == 2


def test_non_finite_values_are_named() -> None:
    with pytest.raises(NonFiniteError, match="survivor 1 is nan"):
        quantise(np.array([0, np.nan], np.float32), Quantiser("mean", 8, 1.0, 3), bytes(16))


def test_packing_known_answer() -> None:
    quantiser = Quantiser("ties", 4, 1.0, 3)  # fields of 6, 6, 2, 2 bits
    words = pack_party(np.array([1.0, -1.0, 0.0], np.float32), quantiser, bytes(16))
    assert words[:3].tolist() == [15 | 1 << 12, 15 << 6 | 1 << 14, 0]
    assert words[3:].tolist() == [15 | 1 << 12, 0]  # weight: all; clipped: none


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["mean", "ties"]),
    st.integers(3, 40),
    st.integers(4, 16),
    st.integers(0, 2**32 - 1),
)
def test_sums_of_words_equal_sums_of_integers(
    aggregate: str, parties: int, bits: int, seed: int
) -> None:
    quantiser = Quantiser(aggregate, bits, 1.0, parties)
    rng = np.random.default_rng(seed)
    # Full scale, so that fields fill up to the last bit.
    values = rng.choice(np.array([-1, -0.3, 0, 0.3, 1], np.float32), (parties, 50))
    keys = [bytes([i]) * 16 for i in range(parties)]
    words = sum(
        pack_party(v, quantiser, k).astype(np.uint64) for v, k in zip(values, keys, strict=True)
    )
    words = cut_words(words.astype(word_type(quantiser.word_bits)), quantiser.word_bits)
    tau = np.array([quantise(v, quantiser, k)[0] for v, k in zip(values, keys, strict=True)])
    sums = unpack_sums(words, quantiser, parties)
    assert (sums.total == tau.sum(0)).all()
    assert sums.weight == parties * quantiser.top
    if aggregate == "ties":
        assert (sums.fields["positive"] == np.maximum(tau, 0).sum(0)).all()
        assert (sums.fields["negative"] == np.maximum(-tau, 0).sum(0)).all()
        assert (sums.fields["positive_count"] == (tau > 0).sum(0)).all()
        assert (sums.fields["negative_count"] == (tau < 0).sum(0)).all()


def test_ties_elects_by_the_sum_and_averages_who_agrees() -> None:
    quantiser = Quantiser("ties", 8, 1.0, 3)
    values = [[1, -0.2, 0.2, 0], [1, -1, -0.2, 0], [-1, 1, 0, 0]]
    words = sum(
        pack_party(np.array(v, np.float32), quantiser, bytes(16)).astype(np.uint64) for v in values
    )
    merged, measured = merge_sums(
        unpack_sums(words.astype(word_type(quantiser.word_bits)), quantiser, 3), quantiser
    )
    assert merged.tolist() == pytest.approx([1.0, -0.6, 0.0, 0.0])
    assert measured.lone_share == 0.75 and measured.conflict_share == 0.75


@pytest.mark.parametrize(("parties", "bits", "most"), [(10, 12, 0.025), (100, 16, 0.0058)])
def test_error_against_float_ties(parties: int, bits: int, most: float) -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(0, 0.1, (parties, 4000)).astype(np.float32)
    quantiser = Quantiser("ties", bits, 0.5, parties)
    words = sum(
        pack_party(v, quantiser, bytes([i]) * 16).astype(np.uint64) for i, v in enumerate(values)
    )
    merged, _ = merge_sums(
        unpack_sums(words.astype(word_type(quantiser.word_bits)), quantiser, parties), quantiser
    )
    total = values.astype(np.float64).sum(0)
    agree = np.sign(values) == np.sign(total)
    exact = (values * agree).sum(0) / agree.sum(0)
    assert np.linalg.norm(merged - exact) / np.linalg.norm(exact) < most


def test_malformed_sums_are_refused() -> None:
    quantiser = Quantiser("ties", 4, 1.0, 3)
    good = pack_party(np.array([1.0, -1.0], np.float32), quantiser, bytes(16))
    for at, word in ((0, 15 | 3 << 12 | 1 << 14), (0, 60 | 1 << 12), (0, 15), (2, 0)):
        bad = good.copy()
        bad[at] = word
        with pytest.raises(ProtocolError, match="malformed"):
            unpack_sums(bad, quantiser, 3)
    mean = Quantiser("mean", 4, 1.0, 3)
    bad = pack_party(np.array([1.0], np.float32), mean, bytes(16))
    bad[0] = 60
    with pytest.raises(ProtocolError, match="at most 45 is possible"):
        unpack_sums(bad, mean, 3)


# --- graph --------------------------------------------------------------------------------


def test_degrees() -> None:
    assert degree_for(5) == 4 and degree_for(100) == 99
    assert [degree_for(101, share) for share in (0.1, 0.2, 0.33)] == [30, 42, 68]
    assert [degree_for(1000, share) for share in (0.1, 0.2, 0.33)] == [54, 118, 330]
    with pytest.raises(ConfigError, match="colluding"):
        degree_for(200, 0.5)


def test_neighbours_are_drawn_alike_and_by_the_party_alone() -> None:
    ids = tuple(range(5, 26))
    random = seeded(3)
    counts = dict.fromkeys(ids, 0)
    for _ in range(2000):
        drawn = draw_neighbours(9, ids, 6, random)
        assert len(set(drawn)) == 6 and 9 not in drawn and list(drawn) == sorted(drawn)
        for other in drawn:
            counts[other] += 1
    del counts[9]
    # 2000 · 6 / 20 = 600 each, standard deviation 20.5.
    assert all(abs(count - 600) < 5 * 20.5 for count in counts.values())
    assert draw_neighbours(2, (1, 2, 3), 2, random) == (1, 3)
    assert draw_neighbours(2, (1, 2, 3), 9, random) == (1, 3)
