"""`dare-agg run`: what the user's folder and words become before Flower starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dare_agg.cli.run import absolute_paths, parse_overrides


def test_paths_named_from_here_become_absolute_and_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("text,label\n")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = parse_overrides(['data="a.csv,reuters-r8"', 'model="model"', "num-rounds=2"])
    absolute_paths(settings)
    assert settings == {
        "data": f"{tmp_path}/a.csv,reuters-r8",
        "model": f"{tmp_path}/model",
        "num-rounds": 2,
    }
    # What is absolute already, or a name, is left alone; nothing is added.
    again = dict(settings)
    absolute_paths(again)
    assert again == settings


@pytest.mark.parametrize("missing", ["flwr", "none"])
def test_doctor_goes_on_without_flower(missing: str) -> None:
    hide = f"import sys; sys.modules[{missing!r}] = None; " if missing != "none" else ""
    code = hide + "from dare_agg.cli.main import main; main(['doctor', '--json'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert '"checks"' in done.stdout, done.stderr
    assert ("not looked at" in done.stdout) == (missing == "flwr")
