"""What a folder or file has in place of weights is said, with what helps."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dare_agg.checkpoint import TensorPlan, open_checkpoint, write_checkpoint
from dare_agg.checkpoint.writer import CheckpointWriter
from dare_agg.errors import CheckpointError
from tests.tiny import WEIGHTS, command

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4976698672\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "base", {"a.weight": np.ones((4, 3), np.float32)})
    return tmp_path / "base"


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value) and error.value.reason == "checkpoint"
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LFS.encode(), "Git LFS pointer, not the file of 4.98 GB"),
        (b"<!DOCTYPE html>\n<html><head>", "web page"),
        (b"\n<!-- saved --><html lang='en'>" + b" " * 999, "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "web page"),
        (b"Entry not found", "server's answer, not weights ('Entry not found')"),
        (b"Invalid username or password.", "server's answer"),
        (b'{"error":"Access to model x is restricted"}', "server's answer"),
        (b"", "is empty: download it again"),
        (bytes(4096), "begins with zeros"),
        (b"PK\x03\x04" + bytes(999), "zip file, as torch.save writes"),
        (b"\x80\x02}q\x00." + bytes(999), "pickle"),
        (b"\x1f\x8b\x08\x00" + bytes(999), "gzip"),
        (b"\x89HDF\r\n\x1a\n" + bytes(999), "HDF5"),
        (b"GGUF\x03\x00\x00\x00" + bytes(999), "GGUF"),
    ],
)
def test_what_stands_for_weights_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    for file in (tmp_path / WEIGHTS, tmp_path / "x.safetensors"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(file)
        assert said in str(error.value), error.value
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_a_download_that_was_cut_off_says_so(base: Path, share: float) -> None:
    content = (base / WEIGHTS).read_bytes()
    (base / WEIGHTS).write_bytes(content[: max(9, int(len(content) * share))])
    assert "cut off" in refused(base)


def shards(folder: Path, names: list[str], *, index: bool = False) -> Path:
    """One tensor a shard, each of other values."""
    plans = {f"w{n}.weight": TensorPlan("F32", (2,), shard) for n, shard in enumerate(names)}
    with CheckpointWriter(folder, plans, {"format": "pt"}) as writer:
        for n in range(len(names)):
            writer.write(f"w{n}.weight", 0, np.full(2, n, np.float32))
    if not index and len(names) > 1:
        (folder / "model.safetensors.index.json").unlink()
    return folder


@pytest.mark.parametrize("stem", ["model", "pytorch_model", "consolidated"])
@pytest.mark.parametrize("first", [0, 1])
def test_shards_without_an_index_are_one_model(stem: str, first: int, tmp_path: Path) -> None:
    names = [f"{stem}-{n + first:05}-of-00003.safetensors" for n in range(3)]
    model = open_checkpoint(shards(tmp_path / "m", names))
    assert [model.array(f"w{n}.weight").tolist() for n in range(3)] == [[n, n] for n in range(3)]
    # The same tensors as with its index.
    same = open_checkpoint(shards(tmp_path / "i", names, index=True))
    assert same.shapes == model.shapes


def test_missing_shards_are_named(tmp_path: Path) -> None:
    names = [f"model-{n:05}-of-00006.safetensors" for n in range(1, 7)]
    for index in (False, True):
        folder = shards(tmp_path / str(index), names, index=index)
        (folder / names[1]).unlink()
        assert f"shard {names[1]} is missing (download or copy them again) of 6" in refused(folder)
        (folder / names[4]).unlink()
        assert f"2 shards ({names[1]}, {names[4]}) are missing" in refused(folder)
    (folder / names[5]).write_text(LFS)
    shutil.copy(folder / names[0], folder / names[1])
    shutil.copy(folder / names[0], folder / names[4])
    assert f"{names[5]} is a Git LFS pointer" in refused(folder)
    (folder / "model.safetensors.index.json").write_text(LFS)
    assert "index.json is a Git LFS pointer" in refused(folder)


def test_shards_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    folder = shards(tmp_path / "m", [f"a-{n:05}-of-00002.safetensors" for n in (1, 2)])
    other = shards(tmp_path / "n", [f"b-{n:05}-of-00002.safetensors" for n in (1, 2)])
    for file in other.glob("*.safetensors"):
        shutil.copy(file, folder)
    assert "shards of two models" in refused(folder)
    for file in folder.glob("b-*"):
        file.unlink()
    shutil.copy(folder / "a-00001-of-00002.safetensors", folder / "a-00002-of-00002.safetensors")
    assert "'w0.weight' is in a-00001-of-00002" in refused(folder)


def test_the_file_that_transformers_loads_is_the_model(base: Path, tmp_path: Path) -> None:
    """A stale index beside model.safetensors counts no more than it does there."""
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone"}}))
    assert open_checkpoint(base).names == ("a.weight",)


def test_weights_that_the_configuration_names_are_not_passed_over(base: Path) -> None:
    (base / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    assert "says that the weights are in 'other.safetensors'" in refused(base)
    (base / "config.json").write_text('{"transformers_weights": "model.safetensors"}')
    open_checkpoint(base)


def test_a_folder_without_weights_says_what_it_has(base: Path, tmp_path: Path) -> None:
    def folder(*files: str) -> Path:
        there = tmp_path / "there"
        shutil.rmtree(there, ignore_errors=True)
        for file in files:
            (there / file).parent.mkdir(parents=True, exist_ok=True)
            (there / file).write_bytes(b"x")
        return there

    assert "pickled weights (pytorch_model.bin)" in refused(folder("pytorch_model.bin"))
    said = refused(folder("training_args.bin", "optimizer.pt", "config.json"))
    assert "pickled" not in said and "has no model.safetensors; give" in said
    assert "Flax weights" in refused(folder("flax_model.msgpack"))
    assert "Keras weights" in refused(folder("tf_model.h5"))
    assert "is an adapter" in refused(folder("adapter_model.safetensors", "adapter_config.json"))
    assert "give the file itself" in refused(folder("consolidated.safetensors"))
    assert "zero_to_fp32.py" in refused(folder("global_step9/mp_rank_00_model_states.pt"))
    assert "accelerate merge-weights" in refused(folder("pytorch_model_fsdp_0/__0_0.distcp"))
    assert "accelerate merge-weights" in refused(folder("__0_0.distcp", ".metadata"))
    there = folder("models--org--m/snapshots/abc/config.json") / "models--org--m/snapshots/abc"
    assert refused(there).endswith("was not finished: hf download org/m")
    (there / WEIGHTS).symlink_to("../../blobs/gone")
    assert "model.safetensors is a link to a file that is not there (../../blobs" in refused(there)
    there = folder("config.json")
    (there / WEIGHTS).symlink_to("gone")
    assert refused(there).endswith("cp -rL)")
    there = folder("checkpoint-500/config.json", "runs/events")
    shutil.copy(base / WEIGHTS, there / "checkpoint-500" / WEIGHTS)
    said = refused(there)
    assert said.endswith(f"give {there / 'checkpoint-500'}")
    open_checkpoint(said.rpartition(" give ")[2])


def test_a_pickle_given_as_a_file_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", b"x")
    assert "torch.save" in refused(tmp_path / "pytorch_model.bin")


def test_a_tokenizer_that_is_a_pointer_is_not_carried(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "tokenizer.json").write_text(LFS)
    (base / "2_Dense").mkdir()
    (base / "2_Dense/pytorch_model.bin").write_bytes(b"PK")
    status, said = command(capsys, "merge", base, base, "-o", tmp_path / "o")
    assert status == 0 and not (tmp_path / "o/tokenizer.json").exists()
    assert "tokenizer.json" in said and "Git LFS pointer" in said
    assert "2_Dense/pytorch_model.bin" in said and "pickled weights" in said


def test_parameters_of_a_sharded_training_are_refused_everywhere(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {"a.weight": np.zeros(0, np.float32), "b.weight": np.ones(2, np.float32)}
    write_checkpoint(tmp_path / "z", arrays)
    for words in (
        ("merge", base, tmp_path / "z", "-o", tmp_path / "o"),
        ("merge", tmp_path / "z", tmp_path / "z", "-o", tmp_path / "o"),
        ("diagnose", tmp_path / "z", base),
        ("diff", base, tmp_path / "z", "-o", tmp_path / "o.dare"),
    ):
        status, said = command(capsys, *words)
        assert status == 1 and "1 of 2 tensors are empty, such as 'a.weight'" in said, said
        assert "ZeRO-3" in said
