"""Merges that cannot be finished: a clear error, nothing left behind, inputs as they were."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dare_agg.checkpoint import CheckpointWriter, TensorPlan
from dare_agg.cli.main import main
from dare_agg.errors import CheckpointError, MergeError
from dare_agg.offline.merging import merge_offline
from dare_agg.offline.recipe import make_recipe

# Runs a merge that must fail with one clear line, which it returns.
Refused = Callable[..., str]
RNG = np.random.default_rng(3)
SHAPES = {"a.weight": (400, 500), "b.weight": (400, 500)}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    base = {n: RNG.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    tuned = {n: a + np.float32(0.001) for n, a in base.items()}
    paths = [tmp_path / "base.safetensors", tmp_path / "m.safetensors"]
    for path, arrays in zip(paths, (base, tuned), strict=True):
        save_file(arrays, path)
    return paths


def in_mounts(script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script where it may mount without anybody seeing it."""
    words = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-rm"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*words, "sh", "-c", "mount -t tmpfs tmpfs /mnt"], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no mount namespaces here")
    return subprocess.run(
        [*words, "sh", "-c", script], capture_output=True, text=True, check=False, timeout=120
    )


def test_a_file_where_a_folder_is_needed(
    models: list[Path], tmp_path: Path, refused: Refused
) -> None:
    for out in (tmp_path / "m.safetensors" / "o.safetensors", tmp_path / "m.safetensors/x/out"):
        error = refused(*models, "-o", out)
        assert f"{out} cannot be written" in error and "where a folder is needed" in error
    assert sorted(os.listdir(tmp_path)) == ["base.safetensors", "m.safetensors"]


def test_a_place_that_cannot_be_written_to(models: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "ro"
    place.mkdir()
    merge = f"{sys.executable} -m dare_agg.cli.main merge {models[0]} {models[1]} -o"
    done = in_mounts(
        f"mount -t tmpfs -o size=200m tmpfs {place} && mount -o remount,ro {place} && "
        f"{merge} {place}/o.safetensors; echo exit $?; {merge} {place}/out; echo exit $?"
    )
    assert done.stdout.split() == ["exit", "1", "exit", "1"], done
    assert done.stderr.count("cannot be written: Read-only file system") == 2
    assert len(done.stderr.splitlines()) == 2


FILL = """
import os, sys
from pathlib import Path
from dare_agg.errors import CheckpointError
from dare_agg.offline.merging import merge_offline
from dare_agg.offline.recipe import make_recipe

base, model, place = sys.argv[1:]
def fill(done, total):
    with open(place + "/hog", "ab", buffering=0) as hog:
        try:
            while True:
                hog.write(bytes(1 << 12))
        except OSError:
            pass
recipe = make_recipe({"base": base, "models": [model], "method": "average"})
for out in ("o.safetensors", "out"):
    try:
        merge_offline(recipe, Path(place, out), tile=4096, on_progress=fill)
    except CheckpointError as error:
        print(error)
    os.unlink(place + "/hog")
print(sorted(os.listdir(place)))
"""


def test_a_disk_that_fills_up_while_writing(models: list[Path], tmp_path: Path) -> None:
    before = [path.read_bytes() for path in models]
    place = tmp_path / "full"
    place.mkdir()
    (tmp_path / "fill.py").write_text(FILL)
    done = in_mounts(
        f"mount -t tmpfs -o size=80m tmpfs {place} && "
        f"{sys.executable} {tmp_path}/fill.py {models[0]} {models[1]} {place}"
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done
    assert all("No space left on device; make room" in line for line in lines[:2])
    assert lines[2] == "[]"
    assert [path.read_bytes() for path in models] == before


def test_too_little_room_is_seen_before_any_work(models: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    done = in_mounts(
        f"mount -t tmpfs -o size=1m tmpfs {place} && {sys.executable} -m dare_agg.cli.main merge "
        f"{models[0]} {models[1]} -o {place}/o.safetensors; echo $?; ls -A {place}"
    )
    assert done.stdout.split() == ["1"] and "make room" in done.stderr, done


def test_a_shard_that_is_missing_or_cut_off(
    models: list[Path], tmp_path: Path, refused: Refused
) -> None:
    folder = tmp_path / "sharded"
    plans = {
        name: TensorPlan("F32", shape, f"model-0000{i}-of-00002.safetensors")
        for i, (name, shape) in enumerate(SHAPES.items(), 1)
    }
    with CheckpointWriter(folder, plans, {}) as writer:
        for name in SHAPES:
            writer.write(name, 0, np.ones(200_000, np.float32))
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    assert shard.name in refused(models[0], folder, "-o", tmp_path / "o.safetensors")
    shard.unlink()
    assert shard.name in refused(models[0], folder, "-o", tmp_path / "o.safetensors")
    assert shard.name in refused(folder, models[1], "-o", tmp_path / "o.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["base.safetensors", "m.safetensors", "sharded"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["o.safetensors", "out"])
def test_a_signal_leaves_nothing(
    models: list[Path], tmp_path: Path, number: signal.Signals, name: str
) -> None:
    # Tiles of one element: it would take minutes.
    words = [*map(str, models), "-o", str(tmp_path / name), "--tile", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dare_agg.cli.main", "merge", *words], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not any(p.endswith(".part") for p in os.listdir(tmp_path)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert process.stderr is not None and b"Traceback" not in process.stderr.read()
    assert sorted(os.listdir(tmp_path)) == ["base.safetensors", "m.safetensors"]


def test_statistics_of_the_other_kind_and_names_with_a_prefix(
    models: list[Path], tmp_path: Path
) -> None:
    from dare_agg.offline.statistics import write_statistics

    rows = {n: np.abs(RNG.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}
    outs = []
    for prefix in ("", "bert."):
        path = tmp_path / f"{prefix or 'plain.'}safetensors"
        named = {prefix + n: a for n, a in rows.items()} | {"classifier.bias": np.ones(2, "f4")}
        write_statistics(path, named, "fisher", {})
        words = {
            "base": str(models[0]), "method": "fisher",
            "models": [{"path": str(m), "statistics": str(path)} for m in models],
        }  # fmt: skip
        outs.append(tmp_path / f"o-{prefix}x.safetensors")
        merge_offline(make_recipe(words), outs[-1])
        with pytest.raises(MergeError, match="holds fisher statistics, gram is needed"):
            merge_offline(make_recipe(words | {"method": "regmean"}), tmp_path / "no.safetensors")
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_the_writer_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "m.safetensors"
    with (
        pytest.raises(CheckpointError, match=r"m\.safetensors cannot be written"),
        CheckpointWriter(out, {"x": TensorPlan("F32", (3,))}, {}),
    ):
        pass
    assert (tmp_path / "file").read_text() == "x"


def test_another_base_is_named_where_the_models_name_it(tmp_path: Path, capsys) -> None:
    base = RNG.standard_normal((60, 50)).astype(np.float32)
    other = base + RNG.standard_normal(base.shape).astype(np.float32) * np.float32(0.02)
    paths = [tmp_path / "base", tmp_path / "m1", tmp_path / "m2"]
    for path, start in zip(paths, (base, other, other), strict=True):
        path.mkdir()
        noise = RNG.standard_normal(base.shape).astype(np.float32) * np.float32(0.001)
        save_file({"w": start if path == paths[0] else start + noise}, path / "model.safetensors")
    (paths[1] / "config.json").write_text('{"_name_or_path": "org/coder"}')
    (paths[2] / "README.md").write_text("---\nbase_model: [org/coder-7b]\n---\n# A card")
    words = ["--json", "--force", "-o", str(tmp_path / "out"), "--method", "average"]
    for command in (["merge", *map(str, paths), *words], ["diagnose", *map(str, paths), "--json"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
        warnings = " ".join(json.loads(capsys.readouterr().out)["warnings"])
        assert "nearer to each other than to BASE" in warnings
        assert "'org/coder' (m1); 'org/coder-7b' (m2)" in warnings
