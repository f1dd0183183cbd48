"""The command line itself: every listed command exists, errors are one line, start is quick."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dare_agg.cli.main import COMMANDS, load_command, main
from dare_agg.merge.methods import METHODS

WITHOUT_EXTRAS = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from dare_agg.cli.main import main
main({arguments})
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_each_listed_command_exists(name: str) -> None:
    assert load_command(name).name == name


@pytest.mark.parametrize("words", [["diff"], ["run"], ["keys", "make"]], ids=" ".join)
def test_help_shows_brackets_as_they_are(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    said = capsys.readouterr().out
    assert "[default: " in said and "\\[" not in said


def test_a_method_is_told_in_lines_that_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    row = METHODS["wudi"]
    with pytest.raises(SystemExit):
        main(["methods", row.name])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{row.name}  {row.formula}" and lines[-1] == f"  {row.reference}"
    assert len(lines) == 3 + len(row.options)
    for key, option in row.options.items():
        assert f"  {key} [{option.default}]: {option.help}" in "\n".join(lines)


def test_a_mistyped_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["merg"])
    assert ended.value.code == 2
    assert "merge" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, dare_agg\nfrom dare_agg.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'numpy', 'torch', 'flwr', 'cryptography', 'pydantic', 'safetensors'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("absent", "arguments", "extra"),
    [
        (["flwr"], ["run", "."], "flower"),
        (["ray"], ["run", "."], "simulation"),
        (["jinja2"], ["diagnose", "BASE", "MODEL", "--report", "PAGE"], "report"),
    ],
)
def test_a_missing_extra_is_named(
    absent: list[str], arguments: list[str], extra: str, tmp_path: Path
) -> None:
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("BASE", "MODEL")}
    for number, path in enumerate(files.values()):
        save_file({"layer.weight": np.full((4, 4), 1 + number / 100, np.float32)}, path)
    files["PAGE"] = str(tmp_path / "page.html")
    arguments = [files.get(word, word) for word in arguments]
    code = WITHOUT_EXTRAS.format(absent=absent, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert f"dare-agg[{extra}]" in done.stderr
