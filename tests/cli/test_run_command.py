"""`dare-agg run`: what the user's folder and words become before Flower starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dare_agg.cli.run import absolute_paths, parse_overrides, run_settings


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


def test_a_resumed_run_keeps_its_downlink_and_a_new_deployment_takes_auto(tmp_path: Path) -> None:
    stored = {
        "status": "running",
        "config": {"downlink": "union-b1", "num-rounds": 4, "output": "x"},
    }
    (tmp_path / "run.json").write_text(json.dumps(stored))
    resumed = run_settings([], deployed=True, resume=tmp_path)
    assert resumed == {"downlink": "union-b1", "num-rounds": 4, "resume": True}
    assert run_settings([], deployed=True, resume=None) == {"downlink": "auto"}
    assert run_settings(["downlink=full"], deployed=True, resume=None) == {"downlink": "full"}
    merge = ["secure=ties", "secure-merge=true"]
    assert run_settings(merge, deployed=True, resume=None)["downlink"] == "full"
    assert run_settings([], deployed=False, resume=None) == {}


@pytest.mark.parametrize("missing", ["flwr", "none"])
def test_doctor_goes_on_without_flower(missing: str) -> None:
    hide = f"import sys; sys.modules[{missing!r}] = None; " if missing != "none" else ""
    code = hide + "from dare_agg.cli.main import main; main(['doctor', '--json'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert '"checks"' in done.stdout, done.stderr
    assert ("not looked at" in done.stdout) == (missing == "flwr")
