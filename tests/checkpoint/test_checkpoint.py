"""Checkpoints against the safetensors library and torch's rounding."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dare_agg.checkpoint import (
    CheckpointWriter,
    TensorPlan,
    carry_files,
    narrow,
    open_checkpoint,
    plan_like,
    widen,
    write_checkpoint,
)
from dare_agg.errors import CheckpointError, LayoutError, NonFiniteError
from dare_agg.vectors.layout import fingerprint

RNG = np.random.default_rng(7)


def model() -> dict[str, np.ndarray]:
    return {
        "b": RNG.standard_normal(5).astype(np.float32),
        "a.weight": RNG.standard_normal((3, 7)).astype(np.float32),
        "h": RNG.standard_normal((2, 2)).astype(np.float16),
        "scalar": np.array(0.5, np.float32),
        "ids": np.arange(4),
        "empty": np.zeros((0, 3), np.float32),
    }


def test_written_files_are_read_by_the_safetensors_library(tmp_path: Path) -> None:
    arrays = model()
    write_checkpoint(tmp_path / "m.safetensors", arrays)
    loaded = load_file(tmp_path / "m.safetensors")
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_a_header_of_odd_length_costs_no_copies(tmp_path: Path) -> None:
    arrays = {name: array for name, array in model().items() if array.dtype.kind == "f"}
    save_file(arrays, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    # As safetensors wrote before it padded: tensors begin wherever the header ends.
    odd = data[8 : 8 + length].rstrip()
    odd += b" " * (1 - len(odd) % 2)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(odd).to_bytes(8, "little") + odd + data[8 + length :])
    checkpoint = open_checkpoint(path)
    layout = checkpoint.layout()
    whole, reader = layout.flatten(arrays), checkpoint.reader(layout)
    np.testing.assert_array_equal(checkpoint.vector(layout), whole)
    np.testing.assert_array_equal(reader.take(np.arange(1, layout.size, 2)), whole[1::2])
    assert checkpoint.fingerprint() == fingerprint(layout, whole)
    checkpoint.check_finite(layout)
    assert not any(checkpoint.raw(name).flags.aligned for name in ("a.weight", "h"))
    assert not any(checkpoint.raw(name).flags.owndata for name in arrays)


def test_library_files_are_read_in_any_tiles(tmp_path: Path) -> None:
    arrays = model()
    save_file(arrays, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    layout = checkpoint.layout()
    assert layout.buffers == ("ids",)
    whole = layout.flatten({n: a.astype(np.float32) for n, a in arrays.items()})
    reader = checkpoint.reader(layout)
    for lo in range(layout.size):
        for hi in range(lo, layout.size + 1):
            out = np.empty(hi - lo, np.float32)
            reader.read(lo, hi, out)
            np.testing.assert_array_equal(out, whole[lo:hi])
    positions = np.array([0, 3, 20, 21, 26, 29])
    np.testing.assert_array_equal(reader.take(positions), whole[positions])
    assert reader.take(positions[:0]).size == 0
    assert checkpoint.fingerprint() == fingerprint(layout, whole)


def test_bfloat16_rounds_and_widens_as_torch_does(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    bits = RNG.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    tensor = torch.from_numpy(values).to(torch.bfloat16)
    np.testing.assert_array_equal(
        narrow(values, "BF16"), tensor.view(torch.int16).numpy().view(np.uint16)
    )
    back = np.empty_like(values)
    widen(narrow(values, "BF16"), "BF16", back)
    np.testing.assert_array_equal(back, tensor.float().numpy())
    finite = values[np.abs(values) < 1e30]
    write_checkpoint(tmp_path / "m.safetensors", {"x": finite}, dtypes={"x": "BF16"})
    from safetensors.torch import load_file as load_torch

    loaded = load_torch(tmp_path / "m.safetensors")["x"]
    assert torch.equal(loaded, torch.from_numpy(finite).to(torch.bfloat16))


def test_sharded_folder_round_trip_keeps_shards(tmp_path: Path) -> None:
    plans = {
        "a": TensorPlan("BF16", (4, 3), "model-00001-of-00002.safetensors"),
        "b": TensorPlan("F32", (5,), "model-00002-of-00002.safetensors"),
        "c": TensorPlan("F16", (2,), "model-00002-of-00002.safetensors"),
    }
    with CheckpointWriter(tmp_path / "m", plans, {}) as writer:
        writer.write("a", 6, np.full(6, 2, np.float32))
        writer.write("a", 0, np.full(6, 1, np.float32))
        writer.write("b", 0, np.arange(5, dtype=np.float32))
        writer.write("c", 0, np.ones(2, np.float32))
        (writer.folder / "config.json").write_text("{}")
        (writer.folder / "README.md").write_text("card")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert len(checkpoint.files) == 2
    np.testing.assert_array_equal(checkpoint.array("a").ravel(), [1] * 6 + [2] * 6)
    planned = plan_like(checkpoint, tmp_path / "n", checkpoint.layout(), "F32")
    assert {p.shard for p in planned.values()} == {p.name for p in checkpoint.files}
    assert planned["a"].dtype == "F32"
    (tmp_path / "n").mkdir()
    assert carry_files(tmp_path / "m", tmp_path / "n").files == ("config.json",)


def test_a_failure_leaves_the_old_model_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    write_checkpoint(out, {"x": np.ones(3, np.float32)})
    before = out.read_bytes()
    plans = {"x": TensorPlan("F16", (3,))}
    with (
        pytest.raises(NonFiniteError, match="'x' at flat index 1"),
        CheckpointWriter(out, plans, {}, overwrite=True) as writer,
    ):
        writer.write("x", 0, np.array([1, 1e6, 1], np.float32))
    assert out.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]
    with pytest.raises(CheckpointError, match="exists"):
        write_checkpoint(out, {"x": np.ones(3, np.float32)})
    write_checkpoint(tmp_path / "f", {"x": np.ones(3, np.float32)})
    write_checkpoint(tmp_path / "f", {"x": np.zeros(3, np.float32)}, overwrite=True)
    assert open_checkpoint(tmp_path / "f").array("x").sum() == 0
    assert sorted(os.listdir(tmp_path)) == ["f", "m.safetensors"]


def test_non_finite_values_are_named(tmp_path: Path) -> None:
    for dtype in ("F32", "F16", "BF16"):
        values = np.ones((70_000, 2), np.float32)
        values[69_999, 1] = np.inf
        plans = {"w": TensorPlan(dtype, (70_000, 2))}
        path = tmp_path / f"{dtype}.safetensors"
        with CheckpointWriter(path, plans, {}) as writer:
            writer.write_raw("w", 0, np.ascontiguousarray(narrow(values.reshape(-1), dtype)))
        checkpoint = open_checkpoint(path)
        with pytest.raises(NonFiniteError, match=r"inf in tensor 'w' at index \(69999, 1\)"):
            checkpoint.check_finite(checkpoint.layout())


def _with_header(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little") + b"{}",
        _with_header([]),
        _with_header({"x": 3}),
        _with_header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}}),
        _with_header({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}),
        _with_header({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        _with_header({"x": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}}),
        _with_header(
            {
                "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "y": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            }
        ),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_wrong_paths_and_layouts_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "no")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(tmp_path)
    write_checkpoint(tmp_path / "a.safetensors", {"x": np.ones((2, 3), np.float32)})
    write_checkpoint(tmp_path / "b.safetensors", {"x": np.ones((2, 4), np.float32)})
    layout = open_checkpoint(tmp_path / "a.safetensors").layout()
    with pytest.raises(LayoutError, match=r"\(2, 4\), the base has \(2, 3\)"):
        open_checkpoint(tmp_path / "b.safetensors").reader(layout)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../a.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(tmp_path / "s")
