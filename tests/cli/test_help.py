"""Help pages: examples that can be typed, the run config's keys, completion, plain text."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from dare_agg.cli.examples import EXAMPLES
from dare_agg.cli.main import COMMANDS, load_command, main
from dare_agg.cli.run_config import as_texts, parse_overrides
from dare_agg.files.app_config import app_defaults, find_app

KEYS = ("make", "roster", "sign", "show", "ledger")
PAGES = [*((name,) for name in COMMANDS), *(("keys", name) for name in KEYS)]


def help_of(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_each_page_has_examples(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(words, capsys)
    assert "\nExamples:\n  dare-agg " in said
    # Only the pattern of the head has one.
    assert "\\" not in said.replace("^head\\.", "")


@pytest.mark.parametrize(
    "example", [words for rows in EXAMPLES.values() for words, _ in rows], ids=str
)
def test_each_example_can_be_typed(example: str) -> None:
    name, *words = shlex.split(example)
    command = load_command(name)
    if hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context(name, words)


def test_each_example_belongs_to_a_command() -> None:
    assert set(EXAMPLES) == {" ".join(words) for words in PAGES}
    assert set(load_command("keys").commands) == set(KEYS)


def test_the_help_of_run_names_each_key_with_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = help_of(("run",), capsys).split()
    usual = app_defaults(find_app(None))
    assert {f"{key}={str(value).lower() if isinstance(value, bool) else value}"
            for key, value in usual.items()} <= set(said)  # fmt: skip


def complete(words: str, shell: str = "zsh") -> str:
    code = "from dare_agg.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "_DARE_AGG_COMPLETE": f"complete_{shell}",
             "_TYPER_COMPLETE_ARGS": words},
    )  # fmt: skip
    return done.stdout + done.stderr


def test_tab_completes_commands_options_and_keys() -> None:
    assert "dequantise" in complete("dare-agg de") and "demo" in complete("dare-agg de")
    assert "--root-certificates" in complete("dare-agg run --ro")
    keys = complete("dare-agg run -c drop")
    assert "drop-rate=" in keys and "num-rounds" not in keys


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("drop-rate=0.99", "0.99"),
        ("model=minilm", "minilm"),
        ("labels=2021,2022", "2021,2022"),
        ("label-column=1", "1"),
        ("label-column=true", "true"),
        ("text-column=2024-05-01", "2024-05-01"),
        ("exclude=^head\\.", "^head\\."),
        ('exclude="^head\\."', "^head\\."),
        ("server-step=adam(beta1=0.8)", "adam(beta1=0.8)"),
        ("num-rounds=3", 3),
        ("alpha=1e-1", 0.1),
        ("evaluate=false", False),
    ],
)
def test_values_need_no_quotes(word: str, value: object) -> None:
    found = as_texts(parse_overrides([word]), app_defaults(find_app(None)))
    assert found == {word.partition("=")[0]: value}


def test_no_color_leaves_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from dare_agg.cli.output import stdout_console\nstdout_console().print('[bold red]x[/]')\n"
    )
    for value, coloured in (("", True), ("1", False)):
        # FORCE_COLOR makes rich believe in a terminal.
        env = {**os.environ, "FORCE_COLOR": "1", "NO_COLOR": value, "TERM": "xterm-256color"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, env=env, check=True
        )
        assert (b"\x1b[" in done.stdout) is coloured
