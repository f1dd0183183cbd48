"""sentence-transformers' folders: OUT has their steps, and steps that differ are said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dare_agg.checkpoint import write_checkpoint
from tests.tiny import command, tensors

KIND = "sentence_transformers.models."
STEPS = [
    {"idx": 0, "path": "", "type": f"{KIND}Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": f"{KIND}Pooling"},
    {"idx": 2, "path": "2_Dense", "type": f"{KIND}Dense"},
]


def embedder(folder: Path, body: float, dense: float, *, pooling: str = "mean") -> Path:
    write_checkpoint(folder, {"a.weight": np.full((4, 4), body, np.float32)})
    weights = {"linear.weight": np.full(4, dense, np.float32)}
    write_checkpoint(folder / "2_Dense/model.safetensors", weights)
    (folder / "1_Pooling").mkdir()
    for file, value in (
        ("modules.json", STEPS),
        ("config.json", {"dtype": "float32"}),
        ("1_Pooling/config.json", {"pooling_mode": pooling}),
        ("2_Dense/config.json", {"bias": False}),
    ):
        (folder / file).write_text(json.dumps(value))
    return folder


def test_steps_are_carried_with_their_weights_and_differences_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = embedder(tmp_path / "base", 1.0, 2.0)
    same = embedder(tmp_path / "same", 1.001, 2.0)
    status, said = command(capsys, "merge", base, same, "-o", tmp_path / "o")
    assert status == 0 and "2_Dense" not in said and "1_Pooling" not in said
    assert tensors(tmp_path / "o/2_Dense")["linear.weight"].tolist() == [2.0] * 4
    pooling = json.loads((tmp_path / "o/1_Pooling/config.json").read_text())
    assert pooling == {"pooling_mode": "mean"}
    other = embedder(tmp_path / "other", 1.001, 2.5, pooling="cls")
    status, said = command(capsys, "merge", base, other, "-o", tmp_path / "p")
    assert status == 0 and f"{other}/1_Pooling/config.json (it is not as BASE's" in said
    # The remedy works as it is written.
    line = next(line for line in said.splitlines() if "dare-agg merge" in line)
    assert command(capsys, *line.partition("dare-agg ")[2].rstrip(")").split())[0] == 0
    assert tensors(tmp_path / "p/2_Dense")["linear.weight"].tolist() == [2.5] * 4
