"""Writes ``docs/CONFIG.md``: the words of run config, node config and environment.

``python -m simulations.pages.config_words`` makes the page from the classes that read the words:
meanings from their docstrings, bounds from their fields, defaults from pyproject.toml. With
``--check`` it writes nothing and fails where the page is of another state of the code.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator

from client.config import NODE_KEYS, TaskConfig
from client.config import NODE_WORDS as CLIENT_WORDS
from client.images import BUILT_IN_IMAGES
from client.instructions.sources import BUILT_IN_CONVERSATIONS
from client.models import MODELS
from client.tasks.table import TASKS
from client.text_sets import BUILT_IN
from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.deploy.devices import AUTO, KINDS
from dare_agg.downlink.ways import DOWNLINKS
from dare_agg.files.app_config import config_defaults, find_app, key_groups
from dare_agg.files.environment import VARIABLES
from dare_agg.flower.node_words import NODE_WORDS
from dare_agg.rounds.server_steps import SERVER_STEPS
from dare_agg.secure.aggregates import SECURE_METHODS
from server.compared import METHODS
from server.config import RunConfig
from server.field_types import OneOf

PAGE = Path(__file__).parents[2] / "docs" / "CONFIG.md"
COMMAND = "python -m simulations.pages.config_words"
# What a text may be where a table says it; a word behind it stands for any other.
CHOICES: Mapping[str, Iterable[str]] = {
    "methods": METHODS,
    "values": (AUTO, *VALUE_FORMATS),
    "dense-values": VALUE_FORMATS,
    "downlink": DOWNLINKS,
    "secure": SECURE_METHODS,
    "server-step": SERVER_STEPS,
    "task": ("auto", *TASKS),
    "model": (*MODELS, "OWNER/NAME", "a folder", "a GGUF file"),
    "data": (
        *BUILT_IN,
        *BUILT_IN_IMAGES,
        *BUILT_IN_CONVERSATIONS,
        "a file",
        "a folder",
        "OWNER/NAME",
    ),
    "device": (AUTO, *KINDS, "cuda:N", "xpu:N"),
    "drop-rate": ("auto", "0 to 1"),
    "upload-budget": ("bytes", "kB", "MB"),
}
HEAD = f"""# Every word

Made by `{COMMAND}` from the classes that read these words; change them there.

**Run config**: `dare-agg run -c KEY=VALUE`, as often as needed, `-c FILE.toml`, or both (the later
word wins); with Flower's own command `flwr run . --run-config "KEY=VALUE KEY=VALUE"` or a TOML
file. Values need no quotes of their own: `-c model=minilm`, `-c drop-rate=0.99`,
`-c methods=fedavg,dare-ties`; a value with blanks or a backslash is put into the shell's, once:
`-c 'exclude=^head\\.'`. A list is written with commas. Defaults stand in `[tool.flwr.app.config]`
of pyproject.toml. A key marked *node* may stand in a node's own config too, where it wins.
"""
NODE_HEAD = """## Node config

What a node says of itself: `dare-agg supernode -- … --node-config 'KEY="VALUE" KEY="VALUE"'` (texts
in quotes, Flower reads them as TOML). Beside the words below,
each key marked *node* above.
"""
ENVIRONMENT_HEAD = """## Environment

Variables that are read; `dare-agg doctor` says which of them hinder.
"""


def meanings(read_by: type) -> dict[str, str]:
    """The "Attributes" of a class's docstring, by kebab-case key, in one line each."""
    words = inspect.cleandoc(read_by.__doc__ or "").partition("Attributes\n----------\n")[2]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in words.splitlines():
        if begun := re.fullmatch(r"([a-z_0-9]+(?:, [a-z_0-9]+)*): (.*)", line):
            names = [name.strip().replace("_", "-") for name in begun[1].split(",")]
            found.update(dict.fromkeys(names, begun[2]))
        elif line.startswith("    "):
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return {name: _markdown(text) for name, text in found.items()}


def _markdown(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|").rstrip(".")


def values_of(key: str) -> str:
    """What a key of the run config may hold, in words."""
    field = RunConfig.model_fields[key.replace("-", "_")]
    if key in CHOICES:
        return _choices(CHOICES[key])
    kind = field.annotation
    if get_origin(kind) is Literal:
        return _choices(map(str, get_args(kind)))
    for check in field.metadata:
        if isinstance(check, AfterValidator) and isinstance(check.func, OneOf):
            return _choices(check.func.known)
    if kind is bool:
        return "true, false"
    if kind in (int, float):
        return _bounds(field.metadata, "a whole number" if kind is int else "a number")
    return "texts, by commas" if get_origin(kind) is tuple else "a text"


def _choices(words: Iterable[str]) -> str:
    return ", ".join(words)


def _bounds(checks: Iterable[Any], kind: str) -> str:
    said = []
    for check in checks:
        for what, sign in ((Ge, "≥"), (Gt, ">"), (Le, "≤"), (Lt, "<")):
            if isinstance(check, what):
                bound = getattr(check, what.__name__.lower())
                power = (bound & (bound - 1) == 0) if isinstance(bound, int) and bound > 4096 else 0
                said.append(f"{sign} {f'2^{bound.bit_length() - 1}' if power else f'{bound:,g}'}")
    return ", ".join([kind, *said])


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else "–"


def _table(head: str, rows: Iterable[str]) -> Iterator[str]:
    yield head
    yield "|---" * (head.count("|") - 1) + "|"
    yield from rows
    yield ""


def page() -> str:
    """The page as it should be. Raises `KeyError` for a key of which no class says the meaning."""
    folder = find_app(None)
    usual = config_defaults(folder / "server" / "config.py")
    said = meanings(TaskConfig) | meanings(RunConfig)
    lines = [HEAD]
    for heading, keys in key_groups(folder).items():
        lines += [f"## {heading}", ""]
        rows = (
            f"| `{key}` | {_shown(usual[key])} | {values_of(key)} | {said[key]} "
            f"| {'node' if key in NODE_KEYS else ''} |"
            for key in keys
        )
        lines += _table("| key | default | values | meaning | |", rows)
    for head, words in (
        (NODE_HEAD, {**CLIENT_WORDS, **NODE_WORDS}),
        (ENVIRONMENT_HEAD, VARIABLES),
    ):
        rows = (f"| `{key}` | {usual} | {said} |" for key, (usual, said) in words.items())
        lines += [head, *_table("| word | where it is left out | meaning |", rows)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a stale page")
    options = parser.parse_args()
    made = page()
    if not options.check:
        PAGE.write_text(made, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != made:
        sys.exit(f"error: {PAGE.name} is of another state of the code; run: {COMMAND}")


if __name__ == "__main__":
    main()
