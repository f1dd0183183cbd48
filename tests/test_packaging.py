"""The wheel: what it holds, and that its core runs without Flower and torch."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = ("flwr", "grpc", "ray", "torch", "transformers", "peft", "matplotlib", "numba")
COMMAND = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv.pop(1))
import dare_agg
assert dare_agg.__file__.startswith(sys.path[0]), dare_agg.__file__
from dare_agg.cli.main import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_library_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"dare_agg"}
    carried = ("py.typed", "codec/UPDATE_FORMAT.md", "runs/report/diagnosis.html.j2",
        "runs/report/page.css", "runs/report/page.js")  # fmt: skip
    assert {f"dare_agg/{name}" for name in carried} <= set(names)


@pytest.mark.slow
def test_the_core_runs_without_flower_and_torch(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", COMMAND, str(tmp_path / "site"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    found = run("methods", "--json")
    assert found.returncode == 0, found.stderr
    assert "ties" in json.dumps(json.loads(found.stdout))
    missing = run("run")
    assert missing.returncode == 1
    assert "pip install" in missing.stderr and "Traceback" not in missing.stderr
