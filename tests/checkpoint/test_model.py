"""A checkpoint as the global model where it lies: as its loaded arrays, in bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dare_agg.checkpoint import open_checkpoint, write_checkpoint
from dare_agg.checkpoint.model import model_in, read_tensor
from dare_agg.errors import LayoutError
from dare_agg.vectors.model import GlobalModel, global_model

RNG = np.random.default_rng(17)


def arrays() -> dict[str, np.ndarray]:
    embedding = RNG.standard_normal((40, 8)).astype(np.float32)
    return {
        "embed.weight": embedding,
        "body.0.weight": RNG.standard_normal((8, 8)).astype(np.float32),
        "body.0.bias": np.zeros(8, np.float32),
        "body.1.weight": RNG.standard_normal((8, 8)).astype(np.float16),
        "norm.running_mean": RNG.standard_normal(8).astype(np.float32),
        "norm.num_batches_tracked": np.array(7),
        "double": RNG.standard_normal((2, 3)),
        "table": np.arange(100, dtype=np.int32),
        "head.weight": RNG.standard_normal((3, 8)).astype(np.float32),
        "out.weight": embedding.copy(),
        "mask": np.array([True, False]),
    }


def same(one: GlobalModel, other: GlobalModel) -> None:
    assert one.groups == other.groups
    assert one.ref == other.ref == one.fingerprints
    np.testing.assert_array_equal(one.delta[:], other.delta[:])
    np.testing.assert_array_equal(one.dense, other.dense)
    ours, theirs = one.arrays(), other.arrays()
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
        np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("apart", [(), ("out.weight",)])
@pytest.mark.parametrize("words", [{}, {"embed.weight": "BF16", "out.weight": "BF16"}])
def test_a_file_is_the_model_of_its_loaded_arrays(tmp_path, words, apart) -> None:
    write_checkpoint(tmp_path / "m.safetensors", arrays(), dtypes=words)
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    loaded = {name: read_tensor(checkpoint, name) for name in checkpoint.names}
    kinds = {"dense": ["body.0.bias"], "exclude": ["head"], "apart": apart}
    found = model_in(checkpoint, **kinds)
    same(found, global_model(loaded, by_form=True, **kinds))
    assert found.groups.copies == ({} if apart else {"out.weight": "embed.weight"})
    assert found.groups.dtypes["embed.weight"] == np.float32
    assert "norm.num_batches_tracked" in found.groups.dense_layout


def test_a_bfloat16_and_a_float32_tensor_of_equal_values_are_tied_as_loaded(tmp_path) -> None:
    weight = (RNG.standard_normal((8, 8)).astype(np.float32).view(np.uint32) >> 16 << 16).view(
        np.float32
    )
    both = {"a": weight, "b": weight.copy(), "c": np.ones((8, 8), np.float32)}
    write_checkpoint(tmp_path / "m.safetensors", both, dtypes={"a": "BF16", "c": "BF16"})
    found = model_in(open_checkpoint(tmp_path / "m.safetensors"))
    same(found, global_model(both, by_form=True))
    assert found.groups.copies == {"b": "a"}


def test_shards_are_one_model(tmp_path) -> None:
    every = dict(sorted(arrays().items()))
    names = list(every)
    save_file({n: every[n] for n in names[:5]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: every[n] for n in names[5:]}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text("{}")
    shard = {n: f"model-0000{1 + (i >= 5)}-of-00002.safetensors" for i, n in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard}))
    same(model_in(open_checkpoint(tmp_path)), global_model(every, by_form=True))


def test_nothing_for_the_delta_group_is_refused(tmp_path) -> None:
    write_checkpoint(tmp_path / "m.safetensors", {"w": np.ones((2, 2), np.float32)})
    with pytest.raises(LayoutError, match="narrow 'exclude'"):
        model_in(open_checkpoint(tmp_path / "m.safetensors"), exclude=["w"])


def test_a_model_opened_again_is_not_read_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dare_agg.checkpoint.fingerprints._SETTLED_SECONDS", 0.0)
    write_checkpoint(tmp_path / "m.safetensors", {"w": RNG.standard_normal((4, 4))})
    first = model_in(open_checkpoint(tmp_path / "m.safetensors")).ref

    def reads(*_: object) -> None:
        raise AssertionError("the file was read")

    monkeypatch.setattr("dare_agg.checkpoint.reader.CheckpointReader.read", reads)
    assert model_in(open_checkpoint(tmp_path / "m.safetensors")).ref == first


_PROBE = """
import sys
from dare_agg.checkpoint import open_checkpoint
from dare_agg.checkpoint.model import model_in
from simulations.runs.memory import Peak, memory_of

before = memory_of()[0]
with Peak(period=0.005) as peak:
    model = model_in(open_checkpoint(sys.argv[1]))
    assert model.groups.copies == {"b": "a"}, model.groups.copies
print((peak.own - before) >> 20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path) -> None:
    # 2 GB, of which the disk holds next to nothing: two tied tensors of 256 M bfloat16 each, and
    # as much beside them.
    path, rows = tmp_path / "m.safetensors", 1 << 18
    nbytes = rows * 1024 * 2
    places = {n: [i * nbytes, (i + 1) * nbytes] for i, n in enumerate("abcd")}
    text = json.dumps(
        {n: {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": p} for n, p in places.items()}
    ).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for name in "ab":
            file.seek(start + places[name][0])
            file.write(b"\x80\x3f")
        file.truncate(start + 4 * nbytes)
    ran = subprocess.run(
        [sys.executable, "-c", _PROBE, str(path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 100
