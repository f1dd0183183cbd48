"""Directions behind an update: what they are, what is refused, and what merges make of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from dare_agg.checkpoint import open_checkpoint, write_checkpoint
from dare_agg.cli.main import main
from dare_agg.codec.directions import (
    CHECKSUM_BYTES,
    GRAM_BITS,
    Directed,
    DirectionsPlan,
    _checksum,
    decode_directions,
    encode_directions,
    plan_directions,
)
from dare_agg.codec.formats import find_values
from dare_agg.codec.update_file import read_update_file
from dare_agg.errors import ConfigError, MergeError, NonFiniteError, UpdateError
from dare_agg.merge.directions import directions_of, leading_directions
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.linears import model_linears
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source

RNG = np.random.default_rng(2)
LAYOUT = layout_of({"a.weight": (40, 90), "b.bias": (40,), "c.weight": (70, 30)})
KEY, CONTEXT = b"k" * 16, b"c" * 32


def low_rank(shape: tuple[int, int], rank: int = 3, noise: float = 0.02) -> np.ndarray:
    left, right = RNG.standard_normal((shape[0], rank)), RNG.standard_normal((rank, shape[1]))
    return left @ right * 1e-3 + noise * 1e-3 * RNG.standard_normal(shape)


@pytest.mark.parametrize("shape", [(120, 90), (90, 120), (20, 200), (12, 9), (300, 64)])
@pytest.mark.parametrize("rank", [1, 5, 9])
def test_they_are_the_leading_right_singular_directions(shape, rank) -> None:
    delta = low_rank(shape, 6)
    found = leading_directions(delta, rank)
    _, sizes, rows = np.linalg.svd(delta, full_matrices=False)
    assert found.shape == (rank, shape[1])
    best = np.square(sizes[:rank]).sum()
    np.testing.assert_allclose(np.square(np.linalg.norm(found, axis=1)).sum(), best, rtol=1e-3)
    # Those before the gap exactly, whatever comes behind.
    for j in range(min(rank, 6)):
        assert abs(found[j] @ rows[j]) == pytest.approx(sizes[j], rel=1e-6)


def test_what_did_not_change_has_none_and_ranks_end_where_the_delta_does() -> None:
    delta = np.zeros(LAYOUT.size, np.float32)
    tensor = LAYOUT["c.weight"]
    delta[tensor.offset : tensor.stop] = low_rank((70, 30), 2, 0).astype(np.float32).reshape(-1)
    found = list(directions_of(array_source(delta), model_linears(LAYOUT), 8))
    assert [(name, len(rows), axis) for name, rows, axis in found] == [("c.weight", 2, 1)]
    with pytest.raises(ConfigError, match="gram rank = 0"):
        list(directions_of(array_source(delta), model_linears(LAYOUT), 0))
    with pytest.raises(ConfigError, match="1 to 4096"):
        list(directions_of(array_source(delta), model_linears(LAYOUT), 4097))
    delta[5] = np.nan
    with pytest.raises(MergeError, match=r"a\.weight"):
        list(directions_of(array_source(delta), model_linears(LAYOUT), 2))


def given(rank: int = 4) -> dict[str, tuple[np.ndarray, int]]:
    return {
        "a.weight": (leading_directions(low_rank((40, 90)), rank), 1),
        "c.weight": (leading_directions(low_rank((30, 70)), rank), 0),
    }


def section_of(found, values: str = "b2") -> tuple[DirectionsPlan, bytes]:
    plan = plan_directions(LAYOUT, found, values)
    return plan, encode_directions(LAYOUT, plan, found, KEY, CONTEXT)


@pytest.mark.parametrize("values", sorted(GRAM_BITS.values()))
def test_the_error_is_the_formats_own_whatever_the_directions_sizes(values) -> None:
    found = {"a.weight": (RNG.standard_normal((40, 90)), 1)}
    # Sizes that differ by four orders of magnitude.
    rows = found["a.weight"][0] * np.logspace(0, -4, 40)[:, None]
    found = {"a.weight": (rows, 1)}
    plan, section = section_of(found, values)
    assert len(section) == plan.nbytes(LAYOUT)
    read = decode_directions(plan, LAYOUT, memoryview(section), KEY, CONTEXT)
    back = read.decoded()["a.weight"]
    error = np.square(back - rows).sum(axis=1) / np.square(rows).sum(axis=1)
    bound = find_values(values).nmse * 1.6 + 1e-4
    assert error.max() < max(bound, 2e-2 if values == "b4" else 0)


@pytest.mark.parametrize(
    ("found", "error", "words"),
    [
        ({"a.weight": (np.ones((2, 89)), 1)}, ConfigError, "(rank, 90)"),
        ({"a.weight": (np.ones((2, 90)), 0)}, ConfigError, "(rank, 40)"),
        ({"a.weight": (np.ones((2, 90)), 2)}, ConfigError, "axis 0 or 1"),
        ({"a.weight": (np.ones((41, 90)), 1)}, ConfigError, "1 to 40"),
        ({"a.weight": (np.ones((0, 90)), 1)}, ConfigError, "1 to 40"),
        ({"b.bias": (np.ones((2, 40)), 1)}, ConfigError, "two dimensions"),
        ({"a.weight": (np.zeros((2, 90)), 1)}, ConfigError, "is 0"),
        ({"a.weight": (np.full((2, 90), np.inf), 1)}, NonFiniteError, "not finite"),
        ({}, ConfigError, "no tensor"),
    ],
)
def test_what_cannot_be_written_is_refused(found, error, words) -> None:
    with pytest.raises(error) as caught:
        section_of(found)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([Directed(0, 0, 1)], "shape"),
        ([Directed(0, 41, 1)], "shape"),
        ([Directed(0, 2**63, 1)], "shape"),
        ([Directed(1, 1, 1)], "layout"),
        ([Directed(0, 1, 2)], "layout"),
        ([Directed(3, 1, 1)], "layout"),
        ([Directed(-1, 1, 1)], "layout"),
        ([Directed(2, 1, 1), Directed(0, 1, 1)], "layout"),
        ([Directed(0, 1, 1), Directed(0, 1, 1)], "layout"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_read(tensors, reason) -> None:
    plan = DirectionsPlan(tuple(tensors), "b2")
    with pytest.raises(UpdateError) as caught:
        decode_directions(plan, LAYOUT, memoryview(b""), KEY, CONTEXT)
    assert caught.value.reason == reason


def test_damage_is_refused() -> None:
    plan, section = section_of(given())
    for blob, key, context, reason in (
        (section[:-1], KEY, CONTEXT, "truncated"),
        (section + b"\0", KEY, CONTEXT, "trailing"),
        (b"\1" + section[1:], KEY, CONTEXT, "checksum"),
        (section, b"j" * 16, CONTEXT, "checksum"),
        (section, KEY, b"d" * 32, "checksum"),
    ):
        with pytest.raises(UpdateError) as caught:
            decode_directions(plan, LAYOUT, memoryview(blob), key, context)
        assert caught.value.reason == reason

    # A sender who knows the key makes the checksum fit, and the numbers are looked at.
    def forged(at: int, number: bytes) -> bytes:
        body = bytearray(section[:-CHECKSUM_BYTES])
        body[at : at + len(number)] = number
        return bytes(body) + _checksum(KEY, CONTEXT, bytes(body))

    scale = len(section) - CHECKSUM_BYTES - 4
    for blob, reason in (
        (forged(0, struct.pack("<H", 0x7FC0)), "non-finite"),
        (forged(0, struct.pack("<H", 0x7F80)), "non-finite"),
        (forged(0, struct.pack("<H", 0x7000)), "non-finite"),
        (forged(0, struct.pack("<H", 0xBF80)), "malformed"),
        (forged(0, struct.pack("<H", 0x8000)), "malformed"),
        (forged(scale, struct.pack("<f", np.nan)), "non-finite"),
    ):
        with pytest.raises(UpdateError) as caught:
            decode_directions(plan, LAYOUT, memoryview(blob), KEY, CONTEXT)
        assert caught.value.reason == reason


SHAPES = {"l0.weight": (60, 80), "l0.bias": (60,), "l1.weight": (24, 60), "emb.weight": (9, 80)}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    base = {n: (RNG.standard_normal(s) * 0.1).astype(np.float32) for n, s in SHAPES.items()}
    paths = [tmp_path / "base.safetensors"]
    write_checkpoint(paths[0], base)
    for number in range(3):
        tuned = {
            n: (a + (low_rank(a.shape) if a.ndim == 2 else 1e-3)).astype(np.float32)
            for n, a in base.items()
        }
        paths.append(tmp_path / f"t{number}.safetensors")
        write_checkpoint(paths[-1], tuned)
    return paths


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code or 0


@pytest.mark.parametrize("keep_rates", ["uniform", "own"])
def test_an_update_carries_them_apply_ignores_them_and_wudi_merges_by_them(
    models: list[Path], tmp_path: Path, capsys, keep_rates: str
) -> None:
    base = models[0]
    updates, bare = [], []
    words = ["--drop-rate", "0.5", "--values", "f32", "--keep-rates", keep_rates]
    for number, tuned in enumerate(models[1:]):
        for names, extra in ((updates, ["--gram", 3, "--gram-bits", 8]), (bare, [])):
            names.append(tmp_path / f"{len(extra)}-{number}.dare")
            assert not call("diff", base, tuned, "-o", names[-1], *words, *extra)
    capsys.readouterr()
    assert not call("inspect", updates[0], "--json")
    facts = json.loads(capsys.readouterr().out)
    plain, _ = read_update_file(bare[0])
    update, header = read_update_file(updates[0])
    assert header.version == 3 and header.by_tensor == (keep_rates == "own")
    directions = facts["directions"]
    assert (directions["tensors"], directions["rank"], directions["values"]) == (2, 3, "i8")
    assert directions["bytes"] == header.carried.nbytes
    assert facts["bytes"] == updates[0].stat().st_size > bare[0].stat().st_size
    assert not call("inspect", updates[0])
    assert "3 directions of 2 tensors in i8" in capsys.readouterr().out

    # The delta is that of the update without them.
    layout = header.layout
    deltas = [np.empty(layout.size, np.float32) for _ in range(2)]
    update.read(0, layout.size, deltas[0])
    plain.read(0, layout.size, deltas[1])
    np.testing.assert_array_equal(*deltas)
    for number, name in enumerate((updates[0], bare[0])):
        assert not call("apply", base, name, "-o", tmp_path / f"applied{number}.safetensors")
    applied = [(tmp_path / f"applied{n}.safetensors").read_bytes() for n in range(2)]
    assert applied[0] == applied[1]

    out = tmp_path / "merged.safetensors"
    assert not call("merge", base, *updates, "-m", "wudi", "-o", out)
    assert "mostly noise" not in capsys.readouterr().err
    read = [read_update_file(path) for path in updates]
    expected, _ = merge_deltas(
        layout, [one for one, _ in read], "wudi",
        statistics=[header.carried.decoded() for _, header in read],
    )  # fmt: skip
    start = layout.flatten(arrays_of(base))
    np.testing.assert_allclose(layout.flatten(arrays_of(out)) - start, expected, atol=2e-7)
    # Nearer to the merge of the whole models than what the survivors alone give.
    whole, alone = tmp_path / "whole.safetensors", tmp_path / "alone.safetensors"
    assert not call("merge", base, *models[1:], "-m", "wudi", "-o", whole)
    capsys.readouterr()
    assert not call("merge", base, *bare, "-m", "wudi", "-o", alone)
    assert "mostly noise" in " ".join(capsys.readouterr().err.split())
    gaps = [
        np.linalg.norm(layout.flatten(arrays_of(p)) - layout.flatten(arrays_of(whole)))
        for p in (out, alone)
    ]
    assert gaps[0] < gaps[1]


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.array(name) for name in SHAPES}


def test_the_command_refuses_what_cannot_be(models: list[Path], tmp_path: Path, capsys) -> None:
    base, tuned = models[0], models[1]
    out = tmp_path / "x.dare"
    for words, message in (
        (["--gram", 0], "gram rank = 0; 1 to 4096"),
        (["--gram", 5000], "gram rank = 5000"),
        (["--gram", 4, "--gram-bits", 3], "gram bits = 3; 1, 2, 4, 8, 16 or 32"),
    ):
        call("diff", base, tuned, "-o", out, *words)
        assert message in " ".join(capsys.readouterr().err.split())
        assert not out.exists()
    call("diff", base, base, "-o", out, "--gram", 4)
    assert "no Linear of the model changed" in " ".join(capsys.readouterr().err.split())


def test_a_file_that_says_other_directions_than_it_has_is_refused(
    models: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "x.dare"
    assert not call("diff", models[0], models[1], "-o", path, "--gram", 3)
    blob = path.read_bytes()
    (length,) = struct.unpack("<I", blob[12:16])
    record = json.loads(blob[16 : 16 + length])
    body = blob[-(-(16 + length) // 8) * 8 :]
    for change, reason in (
        ({"tensors": []}, "layout"),
        ({"tensors": [[2, 10**6, 1]]}, "shape"),
        ({"tensors": [[1, 1, 1]]}, "layout"),
        ({"tensors": [[2, 1.0, 1]]}, "malformed"),
        ({"tensors": [[2, True, 1]]}, "malformed"),
        ({"tensors": "all"}, "layout"),
        ({"values": "b3"}, "values"),
        ({"values": None}, "values"),
        ({"other": 1}, "malformed"),
        # Good by themselves, and of another length than what is there.
        ({"tensors": [[2, 2, 1]]}, "context"),
        ({"values": "f32"}, "truncated"),
    ):
        text = json.dumps(
            {**record, "directions": {**record["directions"], **change}},
            sort_keys=True, separators=(",", ":"),
        ).encode()  # fmt: skip
        head = b"DAREFILE" + struct.pack("<II", 3, len(text)) + text
        path.write_bytes(head + b" " * (-len(head) % 8) + body)
        with pytest.raises(UpdateError) as caught:
            read_update_file(path)
        assert caught.value.reason == reason, change
    # Cut off, and damaged at the end.
    path.write_bytes(blob[:-1])
    with pytest.raises(UpdateError):
        read_update_file(path)
    path.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    with pytest.raises(UpdateError) as caught:
        read_update_file(path)
    assert caught.value.reason == "checksum"
