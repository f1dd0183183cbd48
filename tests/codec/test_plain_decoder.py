"""A second decoder, in plain Python from UPDATE_FORMAT.md alone, agrees to the bit."""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.rates import RateTable, TensorRates
from dare_agg.codec.update import UpdateSpec
from dare_agg.codec.update_file import read_update_file, write_update_file
from dare_agg.rounds.signing import reply_digest
from dare_agg.vectors.layout import fingerprint, layout_of

GOLDEN = Path(__file__).parents[1] / "data" / "codec"
FORMATS = ("f32", "f16", "bf16", "i8", "b4", "b2", "b1")
CASES = [
    *((name, "stratified", "0.75", 3, True) for name in FORMATS),
    ("b1", "stratified", "0.3", 1, True),
    ("b1", "bernoulli", "0.6", 2, True),
    ("i8", "bernoulli", "0.9", 0, False),
    ("b2", "stratified", "0", 0, True),
]
LEVELS = {
    "b1": [1.0],
    "b2": [0.4528, 1.510],
    "b4": [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}
BITS = {"f32": 32, "f16": 16, "bf16": 16, "i8": 8, "b4": 4, "b2": 2, "b1": 1}


def single(value):
    """Round to binary32; sums, products and quotients of two binary32 in binary64 round once."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def keystream(key, count):
    return Cipher(algorithms.AES128(key), modes.CTR(bytes(16))).encryptor().update(bytes(count))


def poly1305(key, message):
    r = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    total = 0
    for at in range(0, len(message), 16):
        total += int.from_bytes(message[at : at + 16] + b"\x01", "little")
        total = total * r % ((1 << 130) - 5)
    return ((total + int.from_bytes(key[16:], "little")) % (1 << 128)).to_bytes(16, "little")


def derive(secret, label, length):
    info = b"dare-agg 1" + b"s" + struct.pack("<I", len(label)) + label
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")[:length]


def tensor_header(name, shape):
    text = name.encode()
    return struct.pack(f"<I{len(text)}sI{len(shape)}Q", len(text), text, len(shape), *shape)


def positions_and_factors(kind, size, num, den, key, rank):
    if kind == "stratified":
        strata = -(-size * den // num)
        words = struct.unpack(f"<{strata}I", keystream(key, 4 * strata))
        found = []
        for j, word in enumerate(words):
            lo, hi = j * num // den, min(size, (j + 1) * num // den)
            found.append((lo + ((word * (hi - lo) >> 32) + rank) % (hi - lo), float(hi - lo)))
        return found
    threshold = (den << 32) // num
    words = struct.unpack(f"<{size}I", keystream(key, 4 * size))
    kept = [
        i
        for i, word in enumerate(words)
        if threshold == 1 << 32 or (word + rank * threshold) % (1 << 32) < threshold
    ]
    return [(i, single(num / den)) for i in kept]


def table_of(data, sizes):
    """Stride and scale of each tensor; None where nothing of it is kept."""
    (threshold,) = struct.unpack("<I", data[:4])
    assert threshold < 96 << 15
    found = []
    for level in data[4:]:
        if not level:
            found.append(None)
            continue
        size = (4 + level % 4) << (level // 4)
        x = ((1 << 15) + threshold % (1 << 15)) << 80
        x = (x << (threshold >> 15) >> 10) // size >> 80
        stride = Fraction(max(x, 32), 32) if x < 512 else Fraction(min(x // 32, 1 << 20))
        found.append((stride, 2.0 ** (level // 4 - 40)))
    assert len(found) == len(sizes)
    return found


def survivors_by_tensor(sizes, table, key, rank):
    """Position, rescale factor and scale of each survivor."""
    found, begin = [], 0
    for size, row in zip(sizes, table, strict=True):
        if size and row:
            num, den, scale = row[0].numerator, row[0].denominator, row[1]
            family, turn = divmod(rank, num // den)
            text = b"dare-agg mask family 1\0" + struct.pack("<I", family) + key
            own = hashlib.sha256(text).digest()[:16] if family else key
            strata = -(-size * den // num)
            first = len(found)
            words = struct.unpack(f"<{strata}I", keystream(own, 4 * (first + strata))[4 * first :])
            for j, word in enumerate(words):
                lo, hi = j * num // den, min(size, (j + 1) * num // den)
                at = lo + ((word * (hi - lo) >> 32) + turn) % (hi - lo)
                found.append((begin + at, float(hi - lo), scale))
        begin += size
    return found


def blocks(count):
    """Lists of survivors' numbers, one a block; then the rest."""
    found, start = [], 0
    while start < count:
        size = min(65536, count - start)
        columns = size // 1024
        for column in range(columns):
            found.append([start + row * columns + column for row in range(1024)])
        at = start + 1024 * columns
        for length in (512, 256, 128, 64, 32):
            if start + size - at >= length:
                found.append(list(range(at, at + length)))
                at += length
        start += size
        if at < start:
            return found, list(range(at, start))
    return found, []


def levels_of(block, distances):
    for d in distances:
        for i in range(len(block)):
            if i // d % 2 == 0:
                a, b = block[i], block[i + d]
                block[i], block[i + d] = single(a + b), single(a - b)


def transform(block):
    if len(block) == 1024:
        levels_of(block, (512, 256, 128, 64, 32))
        block[:] = [block[32 * (i % 32) + i // 32] for i in range(1024)]
        levels_of(block, (512, 256, 128, 64, 32))
        return
    distances = []
    d = len(block) // 2
    while d:
        distances.append(d)
        d //= 2
    levels_of(block, distances)


def decode_payload(name, payload, count, key):
    bits = BITS[name]
    if bits >= 16:
        raw = [payload[i : i + bits // 8] for i in range(0, len(payload), bits // 8)]
        if name == "bf16":
            return [struct.unpack("<f", b"\0\0" + item)[0] for item in raw]
        return [struct.unpack("<f" if name == "f32" else "<e", item)[0] for item in raw]
    groups, rest = blocks(count)
    coded = count - len(rest)
    length = -(-coded * bits // 8)
    number = int.from_bytes(payload[:length], "little")
    codes = [number >> (bits * i) & ((1 << bits) - 1) for i in range(coded)]
    floats = struct.unpack(f"<{len(groups) + len(rest)}f", payload[length:])
    values = [0.0] * count
    signs = keystream(key, -(-count // 8))
    for block, scale in zip(groups, floats, strict=False):
        if name == "i8":
            for i in block:
                values[i] = single((codes[i] - 256 * (codes[i] > 127)) * scale)
            continue
        half = [single(level) for level in LEVELS[name]]
        table = [-level for level in reversed(half)] + half
        turned = [table[codes[i]] for i in block]
        transform(turned)
        for i, y in zip(block, turned, strict=True):
            values[i] = single(y * scale)
            if signs[i // 8] >> (i % 8) & 1:
                values[i] = -values[i]
    for i, value in zip(rest, floats[len(groups) :], strict=True):
        values[i] = value
    return values


def decode_file(blob):
    """Return the dense delta of a file, checking what the specification says must hold."""
    assert blob[:8] == b"DAREFILE"
    version, length = struct.unpack("<II", blob[8:16])
    assert version in (1, 2, 3)
    text = blob[16 : 16 + length]
    record = json.loads(text)
    assert ("directions" in record) == ("by-tensor" in record) == (version == 3)
    if version == 3:
        decode_directions(blob, record)
        blob = blob[: len(blob) - directions_bytes(record)]
        version = 2 if record["by-tensor"] else 1
    start = -(-(16 + length) // 8) * 8
    assert blob[16 + length : start].strip(b" ") == b""
    body = blob[start:]
    size, sizes, layout = 0, [], hashlib.sha256(b"dare-agg layout 1\0")
    for name, _, shape in record["tensors"]:
        layout.update(tensor_header(name, shape))
        numel = 1
        for dimension in shape:
            numel *= dimension
        size += numel
        sizes.append(numel)
    num, den = record["drop-rate"]
    mask_key, values_key = (bytes.fromhex(record[k]) for k in ("mask-key", "values-key"))
    kinds, names = ("stratified", "bernoulli"), FORMATS
    kind, rank = kinds.index(record["mask"]), record["rank"]
    payload = body[120:]
    if version == 1:
        found = positions_and_factors(record["mask"], size, num, den, mask_key, rank)
        survivors = [(at, factor, 1.0) for at, factor in found]
    else:
        table, payload = payload[: 4 + len(sizes)], payload[4 + len(sizes) :]
        survivors = survivors_by_tensor(sizes, table_of(table, sizes), mask_key, rank)
        assert len(survivors) <= -(-size * den // num) + len(sizes)
    digest = hashlib.sha256(
        f"dare-agg mask {version}\0".encode()
        + struct.pack("<BI", kind, rank) + mask_key + values_key
    ).digest()  # fmt: skip
    header = struct.pack(
        "<4sHBBB3xIIIQQQ8s8s8s32s", b"DARE", version, kind, names.index(record["values"]),
        int(record["rescale"]) + 2 * (version == 2), rank, num, den, size, len(survivors),
        len(body) - 120,
        bytes.fromhex(record["base"])[:8], layout.digest()[:8], digest[:8],
        hashlib.sha256(text).digest(),
    )  # fmt: skip
    assert body[:104] == header
    assert body[104:120] == poly1305(
        derive(values_key, b"update checksum", 32), header + body[120:]
    )
    values = decode_payload(record["values"], payload, len(survivors), values_key)
    dense = [0.0] * size
    for (position, factor, scale), coded in zip(survivors, values, strict=True):
        value = single(coded * scale)
        dense[position] = single(value * factor) if record["rescale"] else value
    return dense


def payload_bytes(name, count):
    """Bytes of so many values: codes, a binary32 a block, the rest."""
    if name in ("f32", "f16", "bf16"):
        return count * BITS[name] // 8
    cut, rest = blocks(count)
    return -(-(count - len(rest)) * BITS[name] // 8) + 4 * (len(cut) + len(rest))


def directions_counts(record):
    tensors = record["directions"]["tensors"]
    assert [row[0] for row in tensors] == sorted({row[0] for row in tensors})
    widths = [record["tensors"][index][2][axis] for index, _, axis in tensors]
    return sum(row[1] for row in tensors), sum(
        row[1] * width for row, width in zip(tensors, widths, strict=True)
    )


def directions_bytes(record):
    count, elements = directions_counts(record)
    return 2 * count + payload_bytes(record["directions"]["values"], elements) + 16


def decode_directions(blob, record=None):
    """Return the directions of each tensor of a file, by name, as lists of rows."""
    _, length = struct.unpack("<II", blob[8:16])
    text = blob[16 : 16 + length]
    record = record or json.loads(text)
    section = blob[len(blob) - directions_bytes(record) :]
    secret = bytes.fromhex(record["values-key"])
    key = derive(secret, b"directions", 16)
    assert section[-16:] == poly1305(
        derive(secret, b"directions checksum", 32), hashlib.sha256(text).digest() + section[:-16]
    )
    count, elements = directions_counts(record)
    sizes = decode_payload("bf16", section[: 2 * count], count, key)
    values = decode_payload(record["directions"]["values"], section[2 * count : -16], elements, key)
    found, first, at = {}, 0, 0
    for index, rank, axis in record["directions"]["tensors"]:
        name, _, shape = record["tensors"][index]
        assert len(shape) == 2 and 1 <= rank <= min(4096, *shape)
        rows = []
        for size in sizes[first : first + rank]:
            rows.append([single(size * x) for x in values[at : at + shape[axis]]])
            at += shape[axis]
        first += rank
        found[name] = rows
    assert (first, at) == (count, elements)
    return found


def golden_path(case):
    name, mask, rate, _, _ = case
    return GOLDEN / f"{name}-{mask}-{rate}.dare"


# Keep rates by tensor: levels of encoder.bias, encoder.weight and größe, and the threshold.
BY_TENSOR = [
    *((name, "tensors", "0.75", 3, True) for name in FORMATS),
    ("b1", "tensors", "0.3", 9, True),
    ("i8", "tensors", "0.9", 0, False),
    ("b2", "tensors", "0", 1, True),
]
# Directions behind the update, of one Linear that lies (out, in) and one that lies (in, out): the
# format of their elements.
DIRECTED = [
    *(("b1", f"directed-{name}", "0.75", 3, True) for name in FORMATS),
    ("i8", "directed-tensors-b2", "0.9", 0, False),
]
TABLES = {
    "0.75": (bytes([124, 118, 0]), (34 << 15) + 3000),
    "0.3": (bytes([101, 118, 130]), (32 << 15) + 20_000),
    "0.9": (bytes([90, 118, 121]), 35 << 15),
    "0": (bytes([113, 119, 111]), 0),
}


SHAPES = {"encoder.weight": (70, 75), "encoder.bias": (50,), "größe": ()}


def delta_and_base(layout):
    number = np.arange(layout.size, dtype=np.int64)
    base = ((number * 31 % 1009) - 504).astype(np.float32) * np.float32(2.0**-9)
    delta = ((number * 7919 % 10007) - 5003).astype(np.float32) * np.float32(2.0**-21)
    return delta, base


def integers(rank, width):
    """Directions whose squares sum exactly."""
    number = np.arange(rank * width, dtype=np.float64).reshape(rank, width)
    return ((number * 7919 % 211) - 105) * 2.0 ** -(np.arange(rank)[:, None] + 12.0)


def write_case(case, path):
    """Write a case's file; the delta is made of integers, so it is the same everywhere."""
    name, mask, rate, rank, rescale = case
    layout = layout_of(SHAPES)
    delta, base = delta_and_base(layout)
    secret = seed_secret(11)
    rates, directions, values = None, None, "f32"
    if mask.startswith("directed"):
        _, *by_tensor, values = mask.split("-")
        mask = by_tensor[0] if by_tensor else "stratified"
        layout = layout_of({**SHAPES, "größe": (9, 40)} if not by_tensor else SHAPES)
        delta, base = delta_and_base(layout)
        directions = {"encoder.weight": (integers(7, 75), 1)}
        if not by_tensor:
            directions["größe"] = (integers(3, 9), 0)
    if mask == "tensors":
        levels, threshold = TABLES[rate]
        mask, rates = "stratified", TensorRates(layout.sizes, RateTable(levels, threshold))
        if not levels[-1]:
            delta[-1] = 0
    spec = UpdateSpec(
        layout.size, parse_drop_rate(rate), mask, derive_key(secret, "a mask"),
        derive_key(secret, "values"), rank, name, fingerprint(layout, base), layout.fingerprint,
        rescale, rates=rates,
    )  # fmt: skip
    write_update_file(
        path, spec, layout, delta, seed=11, dtypes={"encoder.bias": "BF16"},
        directions=directions, directions_values=values,
    )  # fmt: skip
    return delta


def case_name(case):
    return f"{case[0]}-{case[1]}-{case[2]}"


@pytest.mark.parametrize("case", [*CASES, *BY_TENSOR, *DIRECTED], ids=case_name)
def test_golden_files_are_written_again_byte_for_byte(case, tmp_path):
    write_case(case, tmp_path / "x.dare")
    assert (tmp_path / "x.dare").read_bytes() == golden_path(case).read_bytes()


@pytest.mark.parametrize("case", [*CASES, *BY_TENSOR, *DIRECTED], ids=case_name)
def test_both_decoders_agree_on_golden_files(case):
    update, header = read_update_file(golden_path(case))
    dense = np.empty(header.layout.size, np.float32)
    update.read(0, dense.size, dense)
    plain = np.array(decode_file(golden_path(case).read_bytes()), np.float32)
    assert plain.tobytes() == dense.tobytes()
    assert np.count_nonzero(dense) > 400


@pytest.mark.parametrize("case", DIRECTED, ids=case_name)
def test_both_decoders_find_the_same_directions(case):
    _, header = read_update_file(golden_path(case))
    found = header.carried.decoded()
    plain = decode_directions(golden_path(case).read_bytes())
    assert list(found) == list(plain) and "encoder.weight" in found
    for name, rows in found.items():
        assert rows.tobytes() == np.array(plain[name], np.float32).tobytes()
    error = np.square(found["encoder.weight"] - integers(7, 75)).sum(axis=1)
    share = error / np.square(integers(7, 75)).sum(axis=1)
    most = {"b1": 1.2, "b2": 0.3, "b4": 0.02, "i8": 2e-3}.get(case[1].rpartition("-")[2], 1e-4)
    assert share.max() < most


def test_what_is_signed_is_what_the_specification_says():
    def sha(data):
        return hashlib.sha256(data).digest()

    plan, numbers = sha(b"a plan"), {"metrics": {"loss": 0.5, "num-examples": 3}}
    text = json.dumps(numbers, sort_keys=True, separators=(",", ":")).encode()
    for dense, statistics in ((b"", b""), (b"dense", b"more")):
        message = b"dare-agg reply 1\0" + plan + sha(b"update") + sha(dense) + sha(text)
        message += sha(statistics) if statistics else b""
        found = reply_digest(plan, b"update", dense or None, numbers, statistics)
        assert found == sha(message)


@pytest.mark.slow
def test_both_decoders_agree_across_groups(tmp_path):
    """More than one group of 65,536 survivors, and every tail block."""
    layout = layout_of({"w": (65536 + 1024 * 2 + 1023,)})
    number = np.arange(layout.size, dtype=np.int64)
    delta = ((number * 7919 % 10007) - 5003).astype(np.float32) * np.float32(2.0**-21)
    spec = UpdateSpec(
        layout.size, parse_drop_rate(0), "stratified", bytes(16), b"v" * 16, 0, "b1", "0" * 64,
        layout.fingerprint,
    )  # fmt: skip
    write_update_file(tmp_path / "x.dare", spec, layout, delta)
    update, _ = read_update_file(tmp_path / "x.dare")
    dense = np.empty(layout.size, np.float32)
    update.read(0, dense.size, dense)
    plain = np.array(decode_file((tmp_path / "x.dare").read_bytes()), np.float32)
    assert plain.tobytes() == dense.tobytes()
