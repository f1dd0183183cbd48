"""Hub names: an existing path first, then the cache, then a download, else the way to get it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dare_agg.checkpoint import open_checkpoint, write_checkpoint
from dare_agg.checkpoint.hub import cache_place, located
from dare_agg.checkpoint.hub_download import wanted_files
from dare_agg.checkpoint.hub_names import hub_name, shown_name
from dare_agg.errors import CheckpointError
from tests.local_hub import COMMIT, local_hub
from tests.tiny import WEIGHTS, command


def model(folder: Path, value: float = 1.0) -> Path:
    write_checkpoint(folder, {"a.weight": np.full((4, 3), value, np.float32)})
    (folder / "config.json").write_text('{"model_type": "x"}')
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in an empty working folder, without a hub."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


def cached(place: Path, name: str, commit: str = COMMIT, ref: str = "main") -> Path:
    """A model in the cache as the hub's tools lay it out: snapshots of links to blobs."""
    folder = place / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    fresh = model(place.parent / "fresh", float(len(commit)))
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for file in fresh.iterdir():
        blob = folder / "blobs" / f"{commit}-{file.name}"
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    fresh.rmdir()
    if ref:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("org/x@refs/pr/3", "org/x@refs/pr/3"),
        ("org/x@main", "org/x"),
        ("https://huggingface.co/org/x", "org/x"),
        (Path("https://huggingface.co/org/x/tree/v2"), "org/x@v2"),
        ("gpt2", None),
        ("./org/x", None),
        ("a/b/c", None),
        ("org/x.safetensors", None),
        ("org/u.dare", None),
        ("../x", None),
        ("org/..", None),
        ("org/x@../../etc", None),
        ("~/x", None),
        ("/org/x", None),
        ("", None),
    ],
)
def test_what_is_a_hub_name(word: str | Path, name: str | None) -> None:
    found = hub_name(word)
    assert (None if found is None else str(found)) == name


def test_a_path_that_exists_wins_and_a_folder_that_exists_is_searched_alone(place: Path) -> None:
    cached(place, "org/x")
    model(Path("org/x"), 7.0)
    assert located("org/x") == Path("org/x")
    # A misspelt file of one's own is no question to somebody else.
    assert hub_name("org/y") is None
    with pytest.raises(CheckpointError, match="org/y does not exist"):
        open_checkpoint(located("org/y"))


def test_names_are_found_in_the_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached(place, "org/x")
    other = cached(place, "org/x", "beef" + "1" * 36, "v2")
    assert located("org/x") == first and located("org/x@v2") == other
    assert located(f"org/x@{COMMIT}") == first and located("org/x@beef111") == other
    assert open_checkpoint(located("org/x")).array("a.weight")[0, 0] == 40
    monkeypatch.delenv("HF_HUB_CACHE")
    for variable, value in (("XDG_CACHE_HOME", place / "xdg"), ("HF_HOME", place / "home")):
        monkeypatch.setenv(variable, str(value))
    assert cache_place() == place / "home" / "hub"
    monkeypatch.delenv("HF_HOME")
    assert cache_place() == place / "xdg" / "huggingface" / "hub"


def test_a_folder_of_the_cache_is_its_snapshot(place: Path) -> None:
    first = cached(place, "org/x", ref="")
    folder = place / "models--org--x"
    assert located(folder) == first
    other = cached(place, "org/x", "beef" + "1" * 36, "")
    with pytest.raises(CheckpointError, match=r"2 snapshots, none of which is main's; give one"):
        located(folder)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(other.name)
    assert located(folder) == other
    (folder / "refs/main").write_text("../../../etc")
    with pytest.raises(CheckpointError, match="2 snapshots"):
        located(folder)
    assert shown_name(folder) == shown_name(first) == "org/x"


def test_a_part_of_a_model_in_the_cache_is_no_model(place: Path) -> None:
    snapshot = cached(place, "org/x")
    (snapshot / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"has it without its weights.*hf download org/x$"):
        located("org/x")
    (snapshot / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        open_checkpoint(located("org/x"))


@pytest.mark.parametrize("kind", ["merge", "diagnose", "diff", "recipe"])
def test_every_command_takes_them(
    kind: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached(place, "org/base")
    tuned = model(Path("tuned"), 40.001)
    Path("r.yaml").write_text(
        "base: org/base\nmodels: [tuned, {path: org/base, weight: 1}]\nout: a/b\n"
        "method: task-arithmetic\n".replace(", {path: org/base, weight: 1}", "")
    )
    words = {
        "merge": ["merge", "org/base", tuned, "-o", "out"],
        "diagnose": ["diagnose", "org/base", tuned],
        "diff": ["diff", "org/base", tuned, "-o", "u.dare"],
        "recipe": ["merge", "--recipe", tmp_path / "here" / "r.yaml"],
    }[kind]
    status, said = command(capsys, *words)
    assert status == 0, said
    if kind == "merge":
        card = Path("out/README.md").read_text()
        assert "base_model: [org/base, tuned]" in card and "base: org/base" in card
        assert COMMIT not in card and json.loads(Path("out/config.json").read_text())
    if kind == "recipe":
        assert open_checkpoint("a/b").array("a.weight")[0, 0] == np.float32(40.001)
    if kind == "diff":
        assert command(capsys, "apply", "org/base", "u.dare", "-o", "applied")[0] == 0


def test_what_cannot_be_had_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    model(Path("tuned"))
    status, said = command(capsys, "merge", "org/base@v2", "tuned", "-o", "out")
    assert status == 1 and "HF_HUB_OFFLINE is set" in said
    assert said.endswith("download it: hf download org/base --revision v2\n")
    # What is missing here is said before anything is asked for.
    status, said = command(capsys, "merge", "org/base", "tunde", "-o", "out")
    assert "tunde does not exist" in said and "OWNER/NAME" in said


def test_files_that_are_wanted() -> None:
    files = [
        "config.json", "tokenizer.json", "tokenizer.model", "README.md", "modeling_x.py", ".env",
        "pytorch_model.bin", "model.safetensors.index.json", "onnx/model.onnx",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "consolidated.safetensors", "original/consolidated.00.pth", "1_Pooling/config.json",
        "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "chat_template.jinja",
    ]  # fmt: skip
    assert wanted_files(files) == [
        "1_Pooling/config.json", "2_Dense/model.safetensors", "chat_template.jinja", "config.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer.model",
    ]  # fmt: skip
    assert wanted_files(["consolidated.safetensors"]) == ["consolidated.safetensors"]
    assert wanted_files(["pytorch_model.bin", "config.json", "2_Dense/model.safetensors"]) == []


def test_a_model_is_downloaded_from_a_hub_once(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    there = model(tmp_path / "there", 3.0)
    (there / "hook.py").write_text("raise SystemExit")
    (there / "pytorch_model.bin").write_bytes(b"PK")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"PK")
    tuned = model(tmp_path / "tuned", 3.001)
    with local_hub({"org/x": there, "org/pickled": pickled}) as hub:
        settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

        def run(base: str) -> str:
            ended = subprocess.run(
                [sys.executable, "-m", "dare_agg.cli.main", "diagnose", base, tuned],
                env={**os.environ, **settings}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            return ended.stdout + ended.stderr

        assert "safe drop rate" in run("org/x")
        snapshot = place / "models--org--x" / "snapshots" / COMMIT
        assert sorted(file.name for file in snapshot.iterdir()) == ["config.json", WEIGHTS]
        before = len(hub.asked)
        assert "safe drop rate" in run("org/x") and len(hub.asked) == before
        assert "no revision 'v9' on the hub" in run("org/x@v9")
        assert "org/pickled has no safetensors on the hub" in run("org/pickled")
        assert "nor has the hub, or it is private" in run("org/none")
    assert located("org/x") == snapshot
    said = subprocess.run(
        [sys.executable, "-m", "dare_agg.cli.main", "diagnose", "org/y", tuned],
        env={**os.environ, **settings}, capture_output=True, text=True, check=False,
    ).stderr  # fmt: skip
    assert "the hub cannot be reached (ConnectError" in said and "hf download org/y" in said
