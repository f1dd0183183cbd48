"""Keep rates by tensor: masks, bytes, errors, and what is refused."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.codec.fitted_rates import fitted_rates, levels_of, tensor_squares
from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import Mask, parse_drop_rate
from dare_agg.codec.payload import payload_bytes
from dare_agg.codec.rates import MAX_THRESHOLD, RateTable, TensorRates, read_table
from dare_agg.codec.update import UpdateSpec, decode_update, encode_update, update_bytes
from dare_agg.codec.update_file import read_update_file, write_update_file
from dare_agg.codec.update_header import CHECKSUM_AT, HEADER_BYTES, checksum_of
from dare_agg.errors import ConfigError, DareError, NonFiniteError, UpdateError
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source

LAYOUT = layout_of({"a": (0,), "b": (30, 40), "c": (), "d": (7,), "e": (5, 999), "f": (3000,)})
SIZES = LAYOUT.sizes
RMS = (0.0, 1e-3, 1e-1, 3.0, 2e-4, 0.0)
_RNG = np.random.default_rng(5)
DELTA = np.concatenate(
    [_RNG.standard_normal(n) * rms for n, rms in zip(SIZES, RMS, strict=True)]
).astype(np.float32)


def levels(delta=DELTA, sizes=SIZES):
    return levels_of(sizes, tensor_squares(sizes, delta))


def spec_of(values="b1", rate="0.9", told=False, **changes):
    rates = fitted_rates(SIZES, levels(), parse_drop_rate(rate), values, told=told)
    spec = UpdateSpec(
        LAYOUT.size, parse_drop_rate(rate), "stratified", b"m" * 16, b"v" * 16, 1, values,
        "ab" * 32, LAYOUT.fingerprint, True, b"a round", rates=rates,
    )  # fmt: skip
    return replace(spec, **changes)


def unread(spec):
    """What a receiver knows beforehand."""
    return spec if spec.rates.told else replace(spec, rates=TensorRates(SIZES))


def decoded(spec, blob):
    out = np.empty(spec.size, np.float32)
    decode_update(blob, unread(spec)).read(0, spec.size, out)
    return out


def refused(blob, spec):
    with pytest.raises(UpdateError) as caught:
        decode_update(bytes(blob), unread(spec))
    return caught.value.reason


def sealed(blob, spec):
    blob = bytearray(blob)
    blob[CHECKSUM_AT:HEADER_BYTES] = checksum_of(spec, memoryview(blob))
    return bytes(blob)


# --- levels and strides ----------------------------------------------------------------------


def test_a_level_stands_for_its_root_mean_square():
    rms = 2.0 ** np.linspace(-39, 23, 500)
    table = RateTable(levels_of([1] * 500, rms**2))
    marks = np.frombuffer(table.levels, np.uint8).astype(np.int64)
    stood_for = (4.0 + marks % 4) * 2.0 ** (marks // 4 - 42)
    assert np.abs(stood_for / rms - 1).max() < 0.126
    assert ((rms / table.scales >= 0.87) & (rms / table.scales < 2.01)).all()


def test_strides_are_exactly_those_of_the_format():
    for threshold in (0, 1, 12345, 40 << 15, (57 << 15) + 777, MAX_THRESHOLD):
        num, den = RateTable(bytes(range(256)), threshold).strides
        assert num[0] == 0
        for a in range(1, 256):
            level = (4 + a % 4) << (a // 4)
            above = (1 << 15) + threshold % (1 << 15)
            power = threshold // (1 << 15) - 10
            x = (above << power) // level if power >= 0 else above // (level << -power)
            stride = (max(x, 32), 32) if x < 512 else (min(x // 32, 1 << 20), 1)
            assert num[a] * stride[1] == stride[0] * den[a], (threshold, a)
            assert np.gcd(num[a], den[a]) == 1


def test_rates_follow_the_levels():
    num, den = spec_of(rate="0.9").rates.table.strides
    keep = np.divide(den, num, where=num > 0, out=np.zeros(len(num)))
    assert keep[0] == keep[5] == 0  # nothing moved there
    assert keep[3] == 1
    assert 4 < keep[1] / keep[4] < 6


# --- bytes -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 20_000), min_size=1, max_size=30),
    st.sampled_from(["0", "0.3", "0.9", "0.99", "0.9999"]),
    st.sampled_from(sorted(VALUE_FORMATS)),
    st.integers(0, 1 << 30),
)
def test_an_update_is_as_long_as_with_one_rate(sizes, rate, values, seed):
    rng = np.random.default_rng(seed)
    rate, size = parse_drop_rate(rate), sum(sizes)
    found = levels_of(sizes, np.array(sizes) * np.exp(rng.normal(-12, 3, len(sizes))))
    rates = fitted_rates(sizes, found, rate, values)
    kept = Mask("stratified", size, rate, b"m" * 16, 0, rates).survivors
    assert kept <= rates.most_survivors(rate.survivors(size))
    if rate.numerator == rate.denominator:
        assert kept == size
        return
    room = payload_bytes(values, rate.survivors(size))
    if payload_bytes(values, sum(n > 0 for n in sizes)) + rates.table_bytes <= room:
        assert payload_bytes(values, kept) + rates.table_bytes <= room


def test_equal_levels_give_about_the_rate():
    rates = fitted_rates([100_000] * 4, bytes([60] * 4), parse_drop_rate("0.9"), "b1")
    kept = Mask("stratified", 400_000, parse_drop_rate("0.9"), b"m" * 16, 0, rates).survivors
    assert 0.98 < kept / 40_000 <= 1


# --- masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["0", "0.4", "0.9", "0.99"])
def test_any_part_of_a_mask_can_be_drawn_alone(rate):
    mask = spec_of(rate=rate).draw_mask()
    whole = np.concatenate([positions.copy() for positions, _ in mask.blocks()])
    assert whole.size == mask.survivors
    assert (np.diff(whole) > 0).all()
    for lo in (0, 1, 1199, 1200, 1201, 1208, 2000, 6203, 7000, mask.size - 1):
        for hi in (lo, lo + 1, lo + 9, lo + 1300, mask.size):
            inside = whole[(whole >= lo) & (whole < hi)]
            assert np.array_equal(mask.indices(lo, hi), inside)
            pieces = [(first, at.copy()) for first, at, _ in mask.within(lo, hi)]
            assert np.array_equal(np.concatenate([at for _, at in pieces] or [inside]), inside)
            if pieces and inside.size:
                assert whole[pieces[0][0]] == inside[0]
        assert mask.ordinal(lo) == np.count_nonzero(whole < lo)
    for first in (0, 3, whole.size // 2):
        found = [positions.copy() for positions, _ in mask.blocks(first, first + 100)]
        assert np.array_equal(np.concatenate(found), whole[first : first + 100])


def test_ranks_are_disjoint_as_far_as_they_fit_and_cover_a_tensor():
    rates = TensorRates((400, 90, 60), RateTable(bytes([40, 44, 52]), 15 << 15), told=True)
    num, den = rates.table.strides
    assert (den == 1).all() and (num == [8, 4, 1]).all()
    masks = [
        Mask("stratified", 550, parse_drop_rate("0.5"), b"m" * 16, rank, rates).indices(0, 550)
        for rank in range(9)
    ]
    for lo, hi, ranks in ((0, 400, 8), (400, 488, 4)):
        seen = np.concatenate([m[(m >= lo) & (m < hi)] for m in masks[:ranks]])
        assert np.array_equal(np.sort(seen), np.arange(lo, hi))
    for first, second in ((0, 4), (4, 8)):  # another family: neither equal nor disjoint
        a, b = (set(m[(m >= 400) & (m < 490)]) for m in (masks[first], masks[second]))
        assert a != b and a & b


def test_every_element_survives_as_often_as_its_tensors_rate_says():
    rates = spec_of(rate="0.8").rates
    counts = np.zeros(LAYOUT.size)
    tries = 400
    for number in range(tries):
        key = struct.pack("<QQ", number, 1)
        mask = Mask("stratified", LAYOUT.size, parse_drop_rate("0.8"), key, number % 5, rates)
        counts[mask.indices(0, LAYOUT.size)] += 1
    num, den = rates.table.strides
    for entry, n, d in zip(LAYOUT.entries, num, den, strict=True):
        part = counts[entry.offset : entry.stop]
        if entry.size > 1000:
            assert abs(part.mean() / tries - (d / n if n else 0)) < 0.003


def test_a_bernoulli_mask_is_refused():
    with pytest.raises(ConfigError, match="stratified"):
        spec_of(mask="bernoulli").draw_mask()


# --- updates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("values", VALUE_FORMATS)
def test_an_update_comes_back_whoever_reads_it_how(values, told):
    spec = spec_of(values, "0.5", told)
    blob = encode_update(spec, DELTA)
    assert len(blob) == update_bytes(spec)
    assert blob == encode_update(spec, (np.zeros_like(DELTA), DELTA))
    assert blob == encode_update(spec, array_source(DELTA))
    assert (blob == encode_update(replace(spec, rates=None), DELTA)) is False
    update = decode_update(blob, unread(spec))
    whole = decoded(spec, blob)
    for tile in (1, 500, 4096):
        out, added = np.empty_like(whole), np.zeros_like(whole)
        for lo in range(0, whole.size, tile):
            hi = min(whole.size, lo + tile)
            update.read(lo, hi, out[lo:hi])
            update.add(lo, hi, added[lo:hi])
        assert np.array_equal(out, whole)
        assert np.array_equal(added, whole)
    if values == "f32":
        positions = np.concatenate([at.copy() for at, _ in update.mask.blocks()])
        kept = np.concatenate(
            [np.broadcast_to(f, at.shape).copy() for at, f in update.mask.blocks()]
        )
        assert np.array_equal(whole[positions], DELTA[positions] * kept)
        assert np.array_equal(update.values(0, update.survivors), DELTA[positions])


@pytest.mark.parametrize("values", ["b1", "i8", "f16"])
def test_updates_are_unbiased(values):
    delta = DELTA[:1208]
    sizes = SIZES[:4]
    total = np.zeros(delta.size, np.float64)
    tries = 600
    rates = fitted_rates(sizes, levels(delta, sizes), parse_drop_rate("0.75"), values)
    for number in range(tries):
        key = struct.pack("<QQ", number, 7)
        spec = UpdateSpec(
            delta.size, parse_drop_rate("0.75"), "stratified", key, key[::-1], number % 9, values,
            "ab" * 32, "cd" * 32, rates=rates,
        )  # fmt: skip
        total += _dense(spec, encode_update(spec, delta), sizes)
    for lo, hi in ((0, 1200), (1201, 1208)):
        error = np.sum((total[lo:hi] / tries - delta[lo:hi]) ** 2) / np.sum(delta[lo:hi] ** 2)
        assert error < 6 / tries


def _dense(spec, blob, sizes):
    out = np.empty(spec.size, np.float32)
    decode_update(blob, replace(spec, rates=TensorRates(sizes))).read(0, spec.size, out)
    return out


@pytest.mark.parametrize("head", [1e-3, 1e-2, 1e-1, 1.0, 1000.0])
def test_a_large_head_is_no_noise_on_the_body(head):
    rng = np.random.default_rng(1)
    sizes, errors = (60_000, 1_000), []
    for number in range(4):
        parts = rng.standard_normal(60_000) * 1e-3, rng.standard_normal(1_000) * head
        delta = np.concatenate(parts).astype(np.float32)
        rates = fitted_rates(sizes, levels(delta, sizes), parse_drop_rate("0"), "b1")
        spec = UpdateSpec(
            delta.size, parse_drop_rate("0"), "stratified", bytes([number] * 16), b"v" * 16, 0,
            "b1", "ab" * 32, "cd" * 32, rates=rates,
        )  # fmt: skip
        out = _dense(spec, encode_update(spec, delta), sizes)
        errors.append(np.sum((out - delta)[:60_000] ** 2) / np.sum(delta[:60_000] ** 2))
    assert 0.555 < np.mean(errors) < 0.595


def test_many_small_tensors_in_a_group_and_several_threads():
    rng = np.random.default_rng(2)
    sizes = tuple(int(n) for n in rng.integers(0, 300, 3000)) + (400_000,)
    delta = (rng.standard_normal(sum(sizes)) * 1e-3).astype(np.float32)
    rates = fitted_rates(sizes, levels(delta, sizes), parse_drop_rate("0.3"), "f32")
    spec = UpdateSpec(
        delta.size, parse_drop_rate("0.3"), "stratified", b"m" * 16, b"v" * 16, 2, "f32",
        "ab" * 32, "cd" * 32, rates=rates,
    )  # fmt: skip
    blob = encode_update(spec, delta)
    assert blob == encode_update(spec, delta, threads=2)
    out = _dense(spec, blob, sizes)
    kept = np.flatnonzero(out)
    assert kept.size > 300_000
    num, den = rates.table.strides
    widths = np.ceil(np.repeat(num / np.maximum(den, 1), sizes))
    factors = out[kept] / delta[kept]
    assert (np.abs(factors - np.round(factors)) < 1e-6).all()
    assert (factors <= widths[kept] + 1e-6).all()


# --- what is refused -------------------------------------------------------------------------


def test_a_plan_of_one_rate_takes_no_table_and_the_other_way_round():
    spec = spec_of()
    plain = replace(spec, rates=None)
    with pytest.raises(UpdateError) as caught:
        decode_update(encode_update(spec, DELTA), plain)
    assert caught.value.reason == "version"
    assert refused(encode_update(plain, DELTA), spec) == "version"


def test_a_table_that_is_told_does_not_travel():
    own, told = spec_of(told=False), spec_of(told=True)
    told = replace(told, rates=replace(own.rates, told=True))
    blob, short = encode_update(own, DELTA), encode_update(told, DELTA)
    assert len(blob) - len(short) == 4 + len(SIZES)
    assert np.array_equal(decoded(own, blob), decoded(told, short))
    assert refused(short, own) in ("malformed", "truncated", "shape", "mask")
    other = RateTable(told.rates.table.levels, told.rates.table.threshold + (1 << 14))
    assert refused(short, replace(told, rates=TensorRates(SIZES, other, told=True))) in (
        "mask", "shape",
    )  # fmt: skip


def test_each_damaged_table_is_refused():
    spec = spec_of()
    blob = bytearray(encode_update(spec, DELTA))
    for cut in (HEADER_BYTES, HEADER_BYTES + 3, HEADER_BYTES + 4 + len(SIZES) - 1):
        assert refused(blob[:cut], spec) == "truncated"
    everything = bytearray(blob)
    everything[HEADER_BYTES : HEADER_BYTES + 4] = struct.pack("<I", 0)
    assert refused(sealed(everything, spec), spec) == "shape"
    beyond = bytearray(blob)
    beyond[HEADER_BYTES : HEADER_BYTES + 4] = struct.pack("<I", MAX_THRESHOLD + 1)
    assert refused(sealed(beyond, spec), spec) == "mask"
    level = bytearray(blob)
    level[HEADER_BYTES + 5] ^= 1
    assert refused(level, spec) in ("checksum", "shape")
    with pytest.raises(UpdateError):
        read_table(bytes(4 + len(SIZES) + 1), len(SIZES))


def test_a_value_beyond_the_bound_is_refused_by_its_real_size():
    sizes = (64, 64)
    rates = TensorRates(sizes, RateTable(bytes([200, 120])))
    spec = UpdateSpec(
        128, parse_drop_rate("0"), "stratified", b"m" * 16, b"v" * 16, 0, "f32", "ab" * 32,
        "cd" * 32, rates=rates,
    )  # fmt: skip
    delta = np.ones(128, np.float32)
    delta[0] = 2.0**20
    encode_update(spec, delta)
    delta[0] = 2.0**20 + 1
    with pytest.raises(NonFiniteError):
        encode_update(spec, delta)


def test_rates_of_another_model_are_refused():
    with pytest.raises(ConfigError, match="elements"):
        replace(spec_of(), size=LAYOUT.size + 1).draw_mask()
    with pytest.raises(ConfigError, match="tensors"):
        TensorRates((1, 2), RateTable(b"\x05"))
    with pytest.raises(DareError):
        encode_update(unread(spec_of()), DELTA)


def test_a_file_brings_its_rates(tmp_path):
    spec = spec_of("b2", "0.7")
    write_update_file(tmp_path / "x.dare", spec, LAYOUT, DELTA, seed=1)
    update, header = read_update_file(tmp_path / "x.dare")
    assert header.by_tensor and update.spec.rates.table == spec.rates.table
    data = bytearray((tmp_path / "x.dare").read_bytes())
    data[8] = 1  # the file version of one rate for all
    (tmp_path / "y.dare").write_bytes(data)
    with pytest.raises(UpdateError) as caught:
        read_update_file(tmp_path / "y.dare")
    assert caught.value.reason == "version"
