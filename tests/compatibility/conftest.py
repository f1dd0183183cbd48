import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dare_agg.cli.main import main
from simulations.runs.memory_grid import pretend_task

HERE = Path(__file__).resolve().parent
# Helpers stand beside the tests; importlib mode puts no test folder on the path.
sys.path.insert(0, str(HERE))


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Copies a part of the fixtures to work on, its keys as private as they were."""
    pretend_task()
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def copy(part: str) -> Path:
        folder = tmp_path / "old" / part
        shutil.copytree(HERE.parent / "data" / "made-by-0.1" / part, folder)
        for path in folder.rglob("*"):
            if path.suffix in (".key", ".pem"):
                path.chmod(0o600)
        return folder

    return copy


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a `dare-agg` command that must succeed; returns what it printed."""

    def run(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return printed.out

    return run
