"""Files and folders appear as a whole, and nothing is followed that somebody else has planted."""

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dare_agg.errors import CheckpointError, ConfigError, StateError
from dare_agg.files import atomic
from dare_agg.files.atomic import (
    file_draft,
    folder_draft,
    put_in_place,
    replace_file,
    write_new,
)

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_is_replaced_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x"
    replace_file(path, (b"one", memoryview(b" two")), mode=0o600)
    assert path.read_bytes() == b"one two" and path.stat().st_mode & 0o777 == 0o600
    replace_file(path, (b"three",))
    assert path.read_bytes() == b"three" and os.listdir(path.parent) == ["x"]


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "x").symlink_to(tmp_path / "victim")
    replace_file(tmp_path / "x", (b"new",))
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "x").is_symlink() and (tmp_path / "x").read_text() == "new"


def test_no_two_drafts_have_one_name(tmp_path: Path) -> None:
    names = {atomic.draft_beside(tmp_path / "x").name for _ in range(100)}
    assert len(names) == 100 and all(name.startswith(".x.") for name in names)


FULL = """
import resource, sys
from pathlib import Path
from dare_agg.errors import StateError
from dare_agg.files.atomic import replace_file, write_new
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (lambda p: replace_file(p, (bytes(100_000),)), lambda p: write_new(p, bytes(100_000))):
    try:
        write(Path(sys.argv[1], "x"))
    except StateError as error:
        print(error)
"""


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("x was not written: File too large; free space" in line for line in lines)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_what_cannot_be_flushed_was_not_written(tmp_path, monkeypatch, code) -> None:
    (tmp_path / "x").write_text("before")

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"x was not written.*; buy a disk"):
        replace_file(tmp_path / "x", (b"after",), kind=CheckpointError, remedy="buy a disk")
    with pytest.raises(ConfigError, match="y was not written"):
        write_new(tmp_path / "y", b"key", kind=ConfigError)
    assert (tmp_path / "x").read_text() == "before" and os.listdir(tmp_path) == ["x"]


def test_an_error_of_the_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), file_draft(tmp_path / "x") as file:
        file.write(b"half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), folder_draft(tmp_path / "f") as folder:
        (folder / "half").write_text("")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_new_file_never_overwrites_and_follows_no_link(tmp_path: Path) -> None:
    write_new(tmp_path / "key", b"one")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("key", "link"):
        with pytest.raises(StateError, match=f"{name} exists; keys stay"):
            write_new(tmp_path / name, b"two", exists="keys stay")
    assert (tmp_path / "key").read_bytes() == b"one" and not (tmp_path / "nowhere").exists()


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with folder_draft(tmp_path / "f") as draft:
            (draft / "sub").mkdir()
            (draft / "sub" / content).write_text(content)
    assert os.listdir(tmp_path) == ["f"] and os.listdir(tmp_path / "f" / "sub") == ["two"]


def test_the_old_folder_comes_back_where_the_rename_fails(tmp_path, monkeypatch) -> None:
    for name in ("old", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    rename = os.replace

    def fail(source: Path, target: Path) -> None:
        if source == tmp_path / "draft":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        put_in_place(tmp_path / "draft", tmp_path / "old")
    assert os.listdir(tmp_path / "old") == ["old"]
    assert sorted(os.listdir(tmp_path)) == ["draft", "old"]


def test_nothing_else_in_the_library_replaces_files() -> None:
    renames = {"replace", "rename", "renames"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "dare_agg").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in renames
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and path != Path(atomic.__file__)
    ]
    assert not found
