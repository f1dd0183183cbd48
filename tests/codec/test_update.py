"""Updates in a round and as files: what is refused, and why."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dare_agg.codec.file_header import FILE_MAGIC
from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import MASK_KINDS, parse_drop_rate
from dare_agg.codec.payload import payload_bytes, payload_sections
from dare_agg.codec.update import UpdateSpec, decode_update, encode_update
from dare_agg.codec.update_file import read_update_file, write_update_file
from dare_agg.codec.update_header import CHECKSUM_AT, HEADER_BYTES, checksum_of
from dare_agg.codec.value_format import MAX_MAGNITUDE, MAX_UPDATE
from dare_agg.errors import (
    REASONS,
    CheckpointError,
    ConfigError,
    DareError,
    NonFiniteError,
    UpdateError,
)
from dare_agg.vectors.layout import layout_of

SHAPES = {"a.weight": (60, 50), "b": (77,), "c": ()}
LAYOUT = layout_of(SHAPES)
DELTA = np.random.default_rng(0).standard_normal(LAYOUT.size).astype(np.float32) * np.float32(1e-3)


def spec_of(values="b1", rate="0.5", mask="stratified", **changes):
    spec = UpdateSpec(
        LAYOUT.size, parse_drop_rate(rate), mask, b"m" * 16, b"v" * 16, 1, values, "ab" * 32,
        LAYOUT.fingerprint, True, b"run 1, round 2",
    )  # fmt: skip
    return replace(spec, **changes)


def refused(blob, spec):
    with pytest.raises(UpdateError) as caught:
        decode_update(bytes(blob), spec)
    assert caught.value.reason in REASONS
    assert "\n" not in str(caught.value)
    return caught.value.reason


def sealed(blob, spec):
    """Give a tampered update a checksum that fits."""
    blob = bytearray(blob)
    blob[CHECKSUM_AT:HEADER_BYTES] = checksum_of(spec, memoryview(blob))
    return bytes(blob)


def changed(blob, at, data):
    blob = bytearray(blob)
    blob[at : at + len(data)] = data
    return blob


def test_the_header_is_small():
    assert HEADER_BYTES <= 128


@pytest.mark.parametrize(
    ("at", "data", "reason"),
    [
        (0, b"DARK", "malformed"),
        (4, b"\x02\x00", "version"),
        (6, b"\x01", "mask"),
        (7, b"\x00", "values"),
        (8, b"\x00", "malformed"),
        (9, b"\x01", "malformed"),
        (12, struct.pack("<I", 9), "mask"),
        (16, struct.pack("<I", 3), "mask"),
        (20, struct.pack("<I", 7), "mask"),
        (24, struct.pack("<Q", 1 << 63), "shape"),
        (32, struct.pack("<Q", 1), "shape"),
        (40, struct.pack("<Q", 2**64 - 1), "shape"),
        (48, b"\x00", "base"),
        (56, b"\x00", "layout"),
        (64, b"\x00" * 8, "mask"),
        (72, b"x", "context"),
        (104, b"\x00" * 16, "checksum"),
        (120, b"\x00" * 16, "checksum"),
    ],
)
def test_each_changed_field_is_refused_for_its_reason(at, data, reason):
    spec = spec_of()
    blob = encode_update(spec, DELTA)
    assert refused(changed(blob, at, data), spec) == reason
    if reason != "checksum":
        assert refused(sealed(changed(blob, at, data), spec), spec) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base": "00" * 32}, "base"),
        ({"layout": "00" * 32}, "layout"),
        ({"size": 4000}, "shape"),
        ({"drop_rate": parse_drop_rate("0.9")}, "mask"),
        ({"mask": "bernoulli"}, "mask"),
        ({"mask_key": bytes(16)}, "mask"),
        ({"values_key": bytes(16)}, "mask"),
        ({"rank": 0}, "mask"),
        ({"values": "b2"}, "values"),
        ({"rescale": False}, "malformed"),
        ({"context": b"run 1, round 3"}, "context"),
    ],
)
def test_an_update_for_another_plan_is_refused(change, reason):
    assert refused(encode_update(spec_of(), DELTA), spec_of(**change)) == reason


@pytest.mark.parametrize("values", VALUE_FORMATS)
def test_missing_and_trailing_bytes(values):
    spec = spec_of(values)
    blob = encode_update(spec, DELTA)
    for cut in (0, 1, HEADER_BYTES - 1, HEADER_BYTES, len(blob) - 1):
        assert refused(blob[:cut], spec) == "truncated"
    assert refused(blob + b"\0", spec) == "trailing"
    assert refused(blob + blob, spec) == "trailing"


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 2.0**61])
@pytest.mark.parametrize("values", ["f32", "bf16", "b1", "i8"])
def test_numbers_that_are_none_are_refused_with_a_fitting_checksum(values, number):
    spec = spec_of(values)
    bits = struct.pack("<f", number)
    data = bits[2:] if values == "bf16" else bits
    blob = encode_update(spec, DELTA)
    at = HEADER_BYTES if values in ("f32", "bf16") else len(blob) - 4
    assert refused(sealed(changed(blob, at, data), spec), spec) == "non-finite"


def test_f16_infinity_is_refused():
    spec = spec_of("f16")
    blob = changed(encode_update(spec, DELTA), HEADER_BYTES, b"\x00\x7c")
    assert refused(sealed(blob, spec), spec) == "non-finite"


def test_codes_scales_and_padding_out_of_bounds_are_refused():
    spec = spec_of("i8")
    blob = changed(encode_update(spec, DELTA), HEADER_BYTES, b"\x80")
    assert refused(sealed(blob, spec), spec) == "malformed"
    spec = spec_of("b1")
    blob = encode_update(spec, DELTA)
    survivors = -(-LAYOUT.size // 2)
    rest = survivors % 32
    scales = HEADER_BYTES + (survivors - rest) // 8
    assert refused(sealed(changed(blob, scales + 3, b"\xbf"), spec), spec) == "malformed"
    assert refused(sealed(changed(blob, scales, b"\0\0\0\x80"), spec), spec) == "malformed"


def test_deltas_that_are_not_finite_are_not_encoded():
    delta = DELTA.copy()
    delta[:] = np.nan
    with pytest.raises(NonFiniteError):
        encode_update(spec_of(), delta)
    with pytest.raises(ConfigError, match="elements"):
        encode_update(spec_of(), delta[:-1])


@given(
    st.sampled_from(sorted(VALUE_FORMATS)),
    st.sampled_from(MASK_KINDS),
    st.sampled_from(["0", "0.3", "0.9", "0.99"]),
    st.integers(0, 30_000),
    st.integers(0, 200),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_any_update_reads_the_same_in_any_parts(values, mask, rate, size, rank, seed):
    rng = np.random.default_rng(seed)
    delta = rng.standard_normal(size).astype(np.float32)
    spec = spec_of(values, rate, mask, size=size, rank=rank)
    update = decode_update(encode_update(spec, delta), spec)
    assert update.nbytes == HEADER_BYTES + payload_bytes(values, update.survivors)
    whole = np.empty(size, np.float32)
    update.read(0, size, whole)
    cuts = sorted({0, size, *(int(c) for c in rng.integers(0, size + 1, 3))})
    added = np.ones(size, np.float32)
    for lo, hi in pairwise(cuts):
        part = np.empty(hi - lo, np.float32)
        update.read(lo, hi, part)
        assert part.tobytes() == whole[lo:hi].tobytes()
        assert np.array_equal(update.present(lo, hi), spec.draw_mask().scatter(
            np.ones(update.survivors, np.float32), rescale=False)[lo:hi] > 0)  # fmt: skip
        update.add(lo, hi, added[lo:hi], 0.5)
    assert np.array_equal(added, np.float32(1) + whole * np.float32(0.5))


# --- files ---------------------------------------------------------------------------------


def file_of(folder, values="b1", mask="stratified", **words):
    path = folder / "x.dare"
    write_update_file(path, spec_of(values, mask=mask), LAYOUT, DELTA, seed=4, **words)
    return path


def file_refused(path, blob):
    path.write_bytes(blob)
    with pytest.raises(UpdateError) as caught:
        read_update_file(path)
    assert caught.value.reason in REASONS
    assert str(path) in str(caught.value)
    return caught.value.reason


def with_header(blob, change):
    """Change the JSON of a file; its context and checksum are made to fit again."""
    (length,) = struct.unpack("<I", blob[12:16])
    record = json.loads(blob[16 : 16 + length])
    body = blob[-(-(16 + length) // 8) * 8 :]
    text = change(record) or json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    head = FILE_MAGIC + struct.pack("<II", 1, len(text)) + text
    return head + b" " * (-len(head) % 8) + body


@pytest.mark.parametrize("mask", MASK_KINDS)
def test_a_file_reads_back(tmp_path, mask):
    path = file_of(tmp_path, mask=mask, dtypes={"b": "BF16"})
    update, header = read_update_file(path)
    assert header.layout == LAYOUT and header.seed == 4
    assert header.base == "ab" * 32
    assert header.dtypes == {"a.weight": "F32", "b": "BF16", "c": "F32"}
    found, expected = np.empty((2, LAYOUT.size), np.float32)
    update.read(0, LAYOUT.size, found)
    decode_update(encode_update(header.spec(), DELTA), header.spec()).read(0, LAYOUT.size, expected)
    assert found.tobytes() == expected.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["x.dare"]


def test_a_failed_write_leaves_nothing_and_an_existing_file_is_kept(tmp_path):
    bad = np.full(LAYOUT.size, np.inf, np.float32)
    with pytest.raises(NonFiniteError):
        write_update_file(tmp_path / "x.dare", spec_of(), LAYOUT, bad)
    assert list(tmp_path.iterdir()) == []
    path = file_of(tmp_path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        write_update_file(path, spec_of(), LAYOUT, DELTA)
    with pytest.raises(NonFiniteError):
        write_update_file(path, spec_of(), LAYOUT, bad, overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["../../etc/x", "/x", "a\nb", "a\\..\\b"])
def test_names_that_lead_astray_are_neither_written_nor_read(tmp_path, name):
    layout = layout_of({name: (5,)})
    spec = spec_of(size=5, layout=layout.fingerprint)
    with pytest.raises(ConfigError, match="tensor name"):
        write_update_file(tmp_path / "y.dare", spec, layout, DELTA[:5])
    blob = file_of(tmp_path).read_bytes()

    def change(record):
        record["tensors"][0][0] = name

    assert file_refused(tmp_path / "y.dare", with_header(blob, change)) == "layout"


def set_to(key, value):
    def change(record):
        record[key] = value

    return change


def tensors(*rows):
    return set_to("tensors", list(rows))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: b"[" * 100_000, "malformed"),
        (lambda r: b'{"base":NaN}', "malformed"),
        (lambda r: b"null", "malformed"),
        (lambda r: b"\xff\xff", "malformed"),
        (lambda r: json.dumps(r).encode(), "malformed"),
        (lambda r: r.pop("seed") and None, "malformed"),
        (set_to("extra", 1), "malformed"),
        (set_to("rank", -1), "malformed"),
        (set_to("rank", 1 << 40), "malformed"),
        (set_to("rank", True), "malformed"),
        (set_to("rank", 2), "mask"),
        (set_to("seed", 1 << 64), "malformed"),
        (set_to("seed", 5), "context"),
        (set_to("rescale", 1), "malformed"),
        (set_to("rescale", False), "context"),
        (set_to("drop-rate", [10, 0]), "mask"),
        (set_to("drop-rate", [10, 20]), "mask"),
        (set_to("drop-rate", [4, 2]), "mask"),
        (set_to("drop-rate", [10**9, 1]), "mask"),
        (set_to("drop-rate", 0.9), "malformed"),
        (set_to("mask", "random"), "malformed"),
        (set_to("mask", "bernoulli"), "mask"),
        (set_to("mask-key", "00"), "malformed"),
        (set_to("mask-key", "0" * 32), "mask"),
        (set_to("values", "b3"), "malformed"),
        (set_to("values", "f16"), "values"),
        (set_to("base", "0" * 64), "base"),
        (set_to("base", "0" * 63), "malformed"),
        (set_to("base", 7), "malformed"),
        (set_to("tensors", {}), "layout"),
        (tensors(["a", "F32", [3]], ["a", "F32", [3]]), "layout"),
        (tensors(["b", "F32", [3]], ["a", "F32", [3]]), "layout"),
        (tensors(["a", "I64", [3]]), "layout"),
        (tensors(["a", "F32", [-3]]), "layout"),
        (tensors(["a", "F32", [2**41]]), "layout"),
        (tensors(["a", "F32", [2**63, 2**63, 2**63]]), "layout"),
        (tensors(["a", "F32", [10**30]]), "layout"),
        (tensors(["a", "F32", [1] * 17]), "layout"),
        (tensors(["", "F32", [3]]), "layout"),
        (tensors(["\ud800", "F32", [3]]), "layout"),
        (tensors(["a", "F32"]), "layout"),
        (tensors(["a", "F32", [2**40]]), "layout"),
    ],
)
def test_headers_out_of_bounds_are_refused(tmp_path, change, reason):
    blob = file_of(tmp_path).read_bytes()
    assert file_refused(tmp_path / "y.dare", with_header(blob, change)) == reason


def test_a_claim_of_2_to_the_40_bernoulli_elements_costs_nothing(tmp_path):
    blob = file_of(tmp_path, mask="bernoulli").read_bytes()
    huge = with_header(blob, tensors(["a", "F32", [2**40]]))
    assert file_refused(tmp_path / "y.dare", huge) in ("layout", "shape")


def test_a_bernoulli_file_with_another_count_is_refused_when_read(tmp_path):
    """The count is believed until the mask is drawn, and not beyond."""
    path = file_of(tmp_path, "f32", mask="bernoulli")
    blob = path.read_bytes()
    _, header = read_update_file(path)
    spec = header.spec()
    start = len(blob) - HEADER_BYTES - payload_bytes("f32", spec.draw_mask().survivors)
    body = bytearray(blob[start:-4])
    struct.pack_into("<QQ", body, 32, spec.draw_mask().survivors - 1, len(body) - HEADER_BYTES)
    path.write_bytes(blob[:start] + sealed(body, spec))
    update, _ = read_update_file(path)
    with pytest.raises(UpdateError) as caught:
        update.read(0, LAYOUT.size, np.empty(LAYOUT.size, np.float32))
    assert caught.value.reason == "shape"


def test_damaged_files_are_refused(tmp_path):
    blob = file_of(tmp_path).read_bytes()
    other = tmp_path / "y.dare"
    for cut in (0, 5, 12, 16, 100, len(blob) - 1):
        assert file_refused(other, blob[:cut]) in ("truncated", "malformed")
    assert file_refused(other, blob + b"\0") == "trailing"
    assert file_refused(other, blob[:8] + b"\x02" + blob[9:]) == "version"
    assert file_refused(other, b"PK\x03\x04" + blob) == "malformed"
    assert file_refused(other, blob[:12] + b"\xff\xff\xff\xff" + blob[16:]) == "malformed"
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(blob)
        damaged[int(rng.integers(len(blob)))] ^= int(rng.integers(1, 256))
        file_refused(other, bytes(damaged))


@given(st.binary(max_size=400))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes_give_a_typed_error(data):
    for blob in (data, encode_update(spec_of(), DELTA)[: len(data)] + data):
        with pytest.raises(DareError):
            decode_update(blob, spec_of())


# --- magnitudes that no training produces --------------------------------------------------

HUGE = [2.0**60, 1.15e18, 2.0**21]


def forged(spec, value, rest=0.0):
    """An update whose survivors are all ``value``, by a sender without the bound."""
    vector = np.full(LAYOUT.size, value, np.float32)
    vector[-(LAYOUT.size % 1024) :] = rest  # 6, fewer than a block
    with np.errstate(all="ignore"):
        return encode_update(replace(spec, most=np.float32(np.inf)), vector)


@pytest.mark.parametrize("value", [*HUGE, -(2.0**60)])
@pytest.mark.parametrize("values", ["f32", "bf16", "i8", "b4", "b2", "b1"])
def test_magnitudes_that_no_training_produces_are_refused(values, value):
    """By what is decoded, by a block's scale alone, and by the unrotated rest alone."""
    spec = spec_of(values, rate="0")
    for vector in ((value, 0.0), (0.0, value)):
        blob = forged(spec, *vector)
        with pytest.raises(NonFiniteError, match=r"magnitude <= 1\.04858e"):
            decode_update(blob, spec)
    with pytest.raises(NonFiniteError, match="survivor number 0"):
        encode_update(spec, np.full(LAYOUT.size, value, np.float32))


@pytest.mark.parametrize("values", ["b4", "b2", "b1", "i8"])
def test_a_scale_written_into_a_payload_is_bounded(values):
    spec = spec_of(values, rate="0")
    blob = bytearray(encode_update(spec, DELTA))
    count = LAYOUT.size
    at = HEADER_BYTES + payload_sections(values, count).codes
    for scale, good in ((2.0**10, True), (2.0**10 * (1 + 2.0**-23), False), (2.0**50, False)):
        blob[at : at + 4] = struct.pack("<f", scale)
        if good:
            decode_update(sealed(blob, spec), spec)
        else:
            with pytest.raises(NonFiniteError, match="1024 times scale number 0"):
                decode_update(sealed(blob, spec), spec)


@pytest.mark.parametrize("values", ["f32", "bf16"])
def test_the_largest_change_passes(values):
    spec = spec_of(values, rate="0")
    vector = np.full(LAYOUT.size, MAX_UPDATE, np.float32)
    update = decode_update(encode_update(spec, vector), spec)
    assert np.array_equal(update.values(0, LAYOUT.size), vector)
    statistics = replace(spec, most=MAX_MAGNITUDE)
    sums = np.full(LAYOUT.size, MAX_MAGNITUDE, np.float32)
    assert decode_update(encode_update(statistics, sums), statistics).values(0, 1) == MAX_MAGNITUDE


@pytest.mark.parametrize("values", ["f32", "b1"])
def test_files_keep_the_bound_too(tmp_path, values):
    path = tmp_path / "x.dare"
    huge = np.full(LAYOUT.size, 2.0**40, np.float32)
    with pytest.raises(NonFiniteError):
        write_update_file(path, spec_of(values), LAYOUT, huge, seed=4)
    assert not path.exists()
    write_update_file(path, spec_of(values, most=MAX_MAGNITUDE), LAYOUT, huge, seed=4)
    with pytest.raises(NonFiniteError):
        read_update_file(path)
