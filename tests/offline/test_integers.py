"""Integers that differ between BASE and a model are no buffers to be kept in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dare_agg.checkpoint import open_checkpoint, write_checkpoint
from tests.tiny import command


def write(path: Path, seed: int, **more: np.ndarray) -> Path:
    w = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32) + seed * np.float32(0.1)
    write_checkpoint(path, {"w": w, **more})
    return path


def test_other_integers_are_refused_and_the_remedy_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write(tmp_path / "b.safetensors", 0, table=np.arange(8), steps=np.array(3))
    other = write(tmp_path / "m.safetensors", 1, table=np.arange(8)[::-1], steps=np.array(9))
    words = ("merge", base, other, "-o", tmp_path / "o.safetensors")
    status, said = command(capsys, *words)
    assert status == 1 and "'table' is I64, with other values than BASE's" in said
    exclude = said.split("keep it: ")[1].split()
    assert exclude == ["--exclude", "'^table$'"]
    assert command(capsys, *words, exclude[0], exclude[1].strip("'"))[0] == 0
    out = open_checkpoint(tmp_path / "o.safetensors")
    assert np.array_equal(out.raw("table"), open_checkpoint(base).raw("table"))
    assert np.allclose(out.array("w"), open_checkpoint(other).array("w"))


def test_integers_that_base_lacks_are_refused_unless_they_are_buffers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write(tmp_path / "b.safetensors", 0)
    ids = np.arange(8)[None]
    words = ("merge", base, write(tmp_path / "m.safetensors", 1, position_ids=ids), "-o")
    assert command(capsys, *words, tmp_path / "o.safetensors")[0] == 0
    other = write(tmp_path / "n.safetensors", 1, **{"router.table": ids})
    words = ("merge", base, other, "-o", tmp_path / "p.safetensors")
    status, said = command(capsys, *words)
    assert status == 1 and "'router.table' of I64 that BASE lacks" in said
    exclude = said.split("leave it out: ")[1].split()
    assert command(capsys, *words, exclude[0], exclude[1].strip("'"))[0] == 0


def test_the_same_values_in_another_dtype_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.tril(np.ones((4, 4), np.uint8))[None, None]
    base = write(tmp_path / "b.safetensors", 0, bias=mask, ids=np.arange(8)[None])
    for number, more in enumerate(
        (
            {"bias": mask.astype(bool), "ids": np.arange(8, dtype=np.int32)},
            {"bias": mask.astype(np.float32)},
            {},
        )
    ):
        model = write(tmp_path / f"{number}.safetensors", 1, **more)
        out = tmp_path / f"o{number}.safetensors"
        assert command(capsys, "merge", base, model, "-o", out)[0] == 0, more
        assert open_checkpoint(out).dtypes == open_checkpoint(base).dtypes
    odd = write(tmp_path / "odd.safetensors", 1, ids=np.arange(6)[None])
    status, said = command(capsys, "diff", base, odd, "-o", tmp_path / "u.dare")
    assert status == 1 and "I64 of shape (1, 8) in BASE, I64 of (1, 6) there" in said


def test_masks_of_minus_infinity_are_bases_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.triu(np.full((8, 8), -np.inf, np.float32), 1)
    base = write(tmp_path / "b.safetensors", 0, **{"text.mask": mask})
    model = write(tmp_path / "m.safetensors", 1, **{"text.mask": mask})
    update, out = tmp_path / "u.dare", tmp_path / "o.safetensors"
    words = ("--drop-rate", "0", "--values", "f32")
    assert command(capsys, "diff", base, model, "-o", update, *words)[0] == 0
    for given in (model, update, write(tmp_path / "n.safetensors", 1)):
        assert command(capsys, "merge", base, given, "-o", out, "--force")[0] == 0
        found = open_checkpoint(out)
        assert np.array_equal(found.array("text.mask"), mask)
        assert np.allclose(found.array("w"), open_checkpoint(model).array("w"))
    other = write(tmp_path / "c.safetensors", 1, **{"text.mask": mask.T})
    status, said = command(capsys, "merge", base, other, "-o", tmp_path / "p.safetensors")
    assert status == 1 and "'text.mask' is a mask of minus infinity in BASE, and another" in said
    exclude = said.split("keep it: ")[1].split()
    words = ("merge", base, other, "-o", tmp_path / "p.safetensors")
    assert command(capsys, *words, exclude[0], exclude[1].strip("'"))[0] == 0
    assert np.array_equal(open_checkpoint(tmp_path / "p.safetensors").array("text.mask"), mask)
