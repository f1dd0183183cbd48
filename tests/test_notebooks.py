"""The notebooks run as they stand, in seconds, and hold no outputs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dare_agg.files.json_text import read_json

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["merge", "simulate"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_has_no_outputs(path: Path) -> None:
    found = read_json(path)
    assert path.stat().st_size < 20_000 and found["nbformat"] == 4
    for cell in found["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert all(len(line) <= 100 for line in "".join(cell["source"]).splitlines())
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    # What it points at is there.
    for text in ("".join(cell["source"]) for cell in found["cells"]):
        for link in re.findall(r"\]\((\.\.[^)#]*)", text):
            assert (path.parent / link).exists(), link


def test_they_run_and_are_shown(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "notebooks.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, timeout=300, env=environment)
    merge, simulate = (tmp_path / f"{path.stem}.md" for path in NOTEBOOKS)
    kept = dict(re.findall(r"^([a-z-]+) +task A +([\d.]+) ", merge.read_text(), re.M))
    assert float(kept["average"]) == pytest.approx(0.5, abs=0.01)
    assert float(kept["task-arithmetic"]) == pytest.approx(1.0, abs=0.01)
    assert 0.8 < float(kept["ties"]) <= 1.0
    sent = re.findall(r"accuracy ([\d.]+), +([\d,]+) bytes", simulate.read_text())
    sizes = [int(size.replace(",", "")) for _, size in sent]
    assert len(sent) == 4 and sizes == sorted(sizes, reverse=True)
    assert float(sent[0][0]) - 0.01 < float(sent[1][0])
